/* One observation to a GPU and one action back, through memory of the host that the GPU reads and writes itself.
 *
 * Requests and answers are pairs of a 32-bit word and the number of the request, each pair one 64-bit access: whoever
 * sees the number sees the word, without a fence and without a second look. */
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

typedef struct {
    volatile uint64_t *inbox;  /* the command, then the observation */
    volatile uint64_t *outbox; /* the outputs, the action, and 1 once a kernel has left */
    int (*launch)(void *graph, void *stream);
    void *graph, *stream;
    int64_t observation, outputs, action; /* numbers of each */
    int64_t patience;                     /* nanoseconds until an answer is given up */
    int32_t tag, command, resident, kind; /* kind of the action: 0 int64, 1 int8, 2 float */
} mailbox;

const int64_t mailbox_bytes = sizeof(mailbox);

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int launched(mailbox *box)
{
    box->outbox[box->outputs + box->action] = 0;
    return box->launch(box->graph, box->stream);
}

/* Waits for all words of the answer. Returns 0, -1 where none came in time, or -2 where a launch failed. */
static int64_t asked(mailbox *box)
{
    const int64_t words = box->outputs + box->action;
    int64_t end = 0;
    if ((!box->resident || box->outbox[words]) && launched(box)) return -2;
    for (int64_t i = 0; i < words; ++i)
        for (uint32_t looks = 1; (int32_t)(box->outbox[i] >> 32) != box->tag; ++looks) {
            if (box->resident && box->outbox[words] && launched(box)) return -2;
            if (looks % 4096 == 0) {
                if (end == 0) end = now() + box->patience;
                if (now() > end) return -1;
            }
            PAUSE();
        }
    return 0;
}

/* As that of kernels/native.c, for one observation and without masks and states: the GPU remembers. */
int64_t policy_run(const void *constants, mailbox *box, const float *observation, const uint8_t *mask, void *action,
                   float *outputs, float *state, int64_t n)
{
    int64_t failed;
    int missing = 0;
    (void)constants, (void)mask, (void)state, (void)n;
    for (int64_t i = 0; i < box->observation; ++i) missing |= observation[i] != observation[i];
    if (missing) return 1;
    const uint64_t tag = (uint64_t)(uint32_t)++box->tag << 32;
    for (int64_t i = 0; i < box->observation; ++i) {
        uint32_t word;
        memcpy(&word, observation + i, 4);
        box->inbox[i + 1] = tag | word;
    }
    box->inbox[0] = tag | (uint32_t)box->command;
    failed = asked(box);
    if (failed) {
        --box->tag;
        return failed;
    }
    box->command = 0;
    for (int64_t i = 0; i < box->outputs && outputs; ++i) {
        const uint32_t word = (uint32_t)box->outbox[i];
        memcpy(outputs + i, &word, 4);
    }
    for (int64_t i = 0; i < box->action; ++i) {
        const uint32_t word = (uint32_t)box->outbox[box->outputs + i];
        if (box->kind == 0) ((int64_t *)action)[i] = (int32_t)word;
        if (box->kind == 1) ((int8_t *)action)[i] = (int8_t)word;
        if (box->kind == 2) memcpy((float *)action + i, &word, 4);
    }
    return 0;
}

/* Tells a resident kernel to leave, and waits until it has. Returns 0, or -1 where it has not in time. */
int64_t mailbox_close(mailbox *box)
{
    const uint64_t tag = (uint64_t)(uint32_t)(box->tag + 1) << 32;
    const int64_t end = now() + box->patience;
    for (int64_t i = 0; i <= box->observation; ++i) box->inbox[i] = tag | 2;
    while (box->outbox[box->outputs + box->action] == 0) {
        if (now() > end) return -1;
        PAUSE();
    }
    return 0;
}
