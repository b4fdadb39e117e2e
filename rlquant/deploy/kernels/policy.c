/* @TITLE@. See policy.h. */
#include "policy.h"

#ifdef POLICY_INTEGER_ONLY
#define LOWEST INT32_MIN
#else
#include <math.h>
#define LOWEST (-INFINITY)
#endif

#ifdef __FAST_MATH__
#error "this file counts on IEEE arithmetic: compile it without -ffast-math"
#endif
/* Floats that are rounded after each operation, whatever precision the hardware has (x87), and that GCC's own
 * dialect, unlike -std=c99, may not fuse into multiply-add. */
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
typedef volatile float rounded;
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__STRICT_ANSI__)
typedef volatile float rounded;
#else
typedef float rounded;
#endif

@MEMORY@

static policy_memory working;
@STATE@
@CONSTANTS@

#ifdef POLICY_INTEGER_ONLY
@INTEGER_PART@
#else
@FLOAT_PART@
#endif

static int missing(const policy_number *observation)
{
    int i;
    for (i = 0; i < POLICY_OBSERVATION_SIZE; ++i)
        if (observation[i] != observation[i]) return 1;
    return 0;
}

int policy_outputs(const policy_number *observation, policy_number *outputs)
{
    policy_memory *memory = &working;
    int i;
    if (missing(observation)) return 1;
    compute(memory, observation);
    for (i = 0; i < POLICY_OUTPUT_SIZE; ++i) outputs[i] = @OUTPUT@[i];
    return 0;
}

int policy_act_masked(const policy_number *observation, const uint8_t *mask, policy_action *action)
{
    policy_memory *memory = &working;
    int i;
    if (missing(observation)) return 1;
    compute(memory, observation);
    for (i = 0; i < POLICY_OUTPUT_SIZE; ++i)
        if (mask != 0 && mask[i] == 0) @OUTPUT@[i] = LOWEST;
    decide(@OUTPUT@, action);
    return 0;
}

void policy_reset(void)
{
@RESET@
}

int policy_act(const policy_number *observation, policy_action *action)
{
    return policy_act_masked(observation, 0, action);
}
