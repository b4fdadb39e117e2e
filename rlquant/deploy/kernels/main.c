/* Checks policy.c against the outputs and actions that rlquant computed: prints ok and returns 0, or says what
 * differs and returns 1. With a number as its argument it takes that many of the observations, again and again. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "policy.h"
#include "policy_test.h"

static float observation[POLICY_OBSERVATION_SIZE];
static float outputs[POLICY_OUTPUT_SIZE];
static policy_action action[POLICY_ACTION_SIZE];

/* The observations are drawn from a few numbers, the tame ones first, in an order that a hash gives. */
static void draw(int row)
{
    uint32_t i, limit = row < POLICY_TESTS / 2 ? POLICY_TAME : POLICY_NUMBERS;
    for (i = 0; i < POLICY_OBSERVATION_SIZE; ++i) {
        uint32_t x = ((uint32_t)row * POLICY_OBSERVATION_SIZE + i) * 2654435761u;
        x = (x ^ (x >> 15)) * 2246822519u;
        observation[i] = test_numbers[(x ^ (x >> 13)) % limit];
    }
}

static int differs(float given, float expected)
{
    return !(given == expected || fabsf(given - expected) <= POLICY_TOLERANCE * (1.0f + fabsf(expected)));
}

static int check(int row)
{
    int i;
    draw(row);
    if (policy_outputs(observation, outputs) != 0 || policy_act(observation, action) != 0) {
        printf("observation %d: refused\n", row);
        return 1;
    }
    for (i = 0; i < POLICY_OUTPUT_SIZE; ++i)
        if (differs(outputs[i], test_outputs[row * POLICY_OUTPUT_SIZE + i])) {
            printf("observation %d: output %d is %.9g, expected %.9g\n", row, i, (double)outputs[i],
                   (double)test_outputs[row * POLICY_OUTPUT_SIZE + i]);
            return 1;
        }
    for (i = 0; i < POLICY_ACTION_SIZE; ++i)
        if (POLICY_TOLERANCE == 0.0f && action[i] != test_actions[row * POLICY_ACTION_SIZE + i]) {
            printf("observation %d: action %d is %.9g, expected %.9g\n", row, i, (double)action[i],
                   (double)test_actions[row * POLICY_ACTION_SIZE + i]);
            return 1;
        }
    return 0;
}

int main(int count, char **arguments)
{
    int row, wrong = 0, repeats = count > 1 ? atoi(arguments[1]) : -1;
    for (row = 0; row < repeats; ++row) {
        draw(row % POLICY_TESTS);
        wrong += policy_act(observation, action);
    }
    if (repeats >= 0) return wrong != 0;
    for (row = 0; row < POLICY_TESTS; ++row) wrong += check(row);
    draw(0);
    observation[0] = NAN;
    if (policy_act(observation, action) == 0) {
        printf("NaN was not refused\n");
        ++wrong;
    }
    printf(wrong ? "%d mismatches\n" : "ok: %d observations\n", wrong ? wrong : POLICY_TESTS);
    return wrong != 0;
}
