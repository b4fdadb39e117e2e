
#include <math.h>

typedef int64_t policy_index;
typedef float rounded; /* after each operation: -ffp-contract=off sees to it */
@MEMORY@

const int64_t policy_memory_bytes = sizeof(policy_memory);
@HELPERS@

static void compute(const uint8_t *constants, policy_memory *memory, const float *restrict observation, float *state)
{
@COMPUTE@
}

static void decide(const uint8_t *constants, const float *y, @ACTION@ *restrict action)
{
@DECIDE@
}

/* Actions of n observations, and what each state becomes. Returns 0, or i + 1 where observation i holds NaN. */
int64_t policy_run(const uint8_t *constants, policy_memory *memory, const float *observation, const uint8_t *mask,
                   @ACTION@ *action, float *outputs, float *state, int64_t n)
{
    for (int64_t at = 0; at < n; ++at, observation += @OBSERVATION_SIZE@, action += @ACTION_SIZE@, state += @STATE_SIZE@) {
        float *y;
        int missing = 0;
        for (int i = 0; i < @OBSERVATION_SIZE@; ++i) missing |= observation[i] != observation[i];
        if (missing) return at + 1;
        compute(constants, memory, observation, state);
        y = @OUTPUT@;
        if (outputs) memcpy(outputs + at * @OUTPUT_SIZE@, y, @OUTPUT_SIZE@ * sizeof(float));
        if (mask)
            for (int i = 0; i < @OUTPUT_SIZE@; ++i)
                if (!mask[at * @OUTPUT_SIZE@ + i]) y[i] = -INFINITY;
        decide(constants, y, action);
    }
    return 0;
}
