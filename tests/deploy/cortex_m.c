/* What a program for a bare Cortex-M needs to run under qemu-arm: a start, and Linux system calls. */
void _init(void) {}
void _fini(void) {}

static int call(int number, int first, const void *second, int third)
{
    register int r0 __asm__("r0") = first;
    register const void *r1 __asm__("r1") = second;
    register int r2 __asm__("r2") = third;
    register int r7 __asm__("r7") = number;
    __asm__ volatile("svc 0" : "+r"(r0) : "r"(r1), "r"(r2), "r"(r7) : "memory");
    return r0;
}

int _write(int file, const void *text, int length) { return call(4, file, text, length); }

void _exit(int status)
{
    call(1, status, 0, 0);
    for (;;) {}
}

void *_sbrk(int bytes)
{
    static char heap[1 << 16];
    static int used;
    void *start = heap + used;
    used += bytes;
    return start;
}

int main(int, char **);
void exit(int);
void begin(int *stack) { exit(main(stack[0], (char **)(stack + 1))); }
__attribute__((naked)) void _start(void) { __asm__("mov r0, sp\n bic r1, r0, #7\n mov sp, r1\n b begin"); }
