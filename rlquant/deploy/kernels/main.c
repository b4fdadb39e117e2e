/* Checks policy.c against the outputs and actions that rlquant computed: prints ok and returns 0, or says what
 * differs and returns 1. With a number as its argument it takes that many of the observations, again and again. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "policy.h"
#include "policy_test.h"

static policy_number observation[POLICY_OBSERVATION_SIZE];
static policy_number outputs[POLICY_OUTPUT_SIZE];
static policy_action action[POLICY_ACTION_SIZE];

#ifdef POLICY_INTEGER_ONLY
static policy_number number(float x)
{
    double scaled = floor((double)x * (1L << POLICY_FRACTION) + 0.5);
    return scaled > INT32_MAX ? INT32_MAX : scaled < INT32_MIN ? INT32_MIN : (policy_number)scaled;
}
#else
static policy_number number(float x) { return x; }
#endif

/* The observations are drawn from a few numbers, the tame ones first, in an order that a hash gives. */
static void draw(int row)
{
    uint32_t i, limit = row < POLICY_TESTS / 2 ? POLICY_TAME : POLICY_NUMBERS;
    for (i = 0; i < POLICY_OBSERVATION_SIZE; ++i) {
        uint32_t x = ((uint32_t)row * POLICY_OBSERVATION_SIZE + i) * 2654435761u;
        x = (x ^ (x >> 15)) * 2246822519u;
        observation[i] = number(test_numbers[(x ^ (x >> 13)) % limit]);
    }
}

static int differs(double given, double expected, double tolerance)
{
    return !(given == expected || fabs(given - expected) <= tolerance * (1.0 + fabs(expected)));
}

static int check_outputs(int row)
{
    int i;
    draw(row);
    if (policy_outputs(observation, outputs) != 0) {
        printf("observation %d: refused\n", row);
        return 1;
    }
#ifndef POLICY_INTEGER_ONLY
    for (i = 0; i < POLICY_OUTPUT_SIZE; ++i) {
        double given = outputs[i], expected = test_outputs[row * POLICY_OUTPUT_SIZE + i];
        if (differs(given, expected, POLICY_TOLERANCE)) {
            printf("observation %d: output %d is %.9g, expected %.9g\n", row, i, given, expected);
            return 1;
        }
    }
#else
    (void)i;
#endif
    return 0;
}

static int check_action(int row)
{
    int i;
    draw(row);
    if (policy_act(observation, action) != 0) {
        printf("observation %d: refused\n", row);
        return 1;
    }
    for (i = 0; i < POLICY_ACTION_SIZE; ++i) {
        double given = action[i], expected = test_actions[row * POLICY_ACTION_SIZE + i];
#ifdef POLICY_INTEGER_ONLY
        if (differs(given / POLICY_ACTION_ONE, expected, POLICY_ACTION_ONE > 1 ? 0.02 : 0.0)) {
#else
        if (POLICY_TOLERANCE == 0.0f && given != expected) {
#endif
            printf("observation %d: action %d is %.9g, expected %.9g\n", row, i, given, expected);
            return 1;
        }
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
    for (row = 0; row < POLICY_TESTS; ++row) wrong += check_outputs(row);
    policy_reset(); /* the observations are those of one episode */
    for (row = 0; row < POLICY_TESTS; ++row) wrong += check_action(row);
#ifndef POLICY_INTEGER_ONLY
    draw(0);
    observation[0] = NAN;
    if (policy_act(observation, action) == 0) {
        printf("NaN was not refused\n");
        ++wrong;
    }
#endif
    printf(wrong ? "%d mismatches\n" : "ok: %d observations\n", wrong ? wrong : POLICY_TESTS);
    return wrong != 0;
}
