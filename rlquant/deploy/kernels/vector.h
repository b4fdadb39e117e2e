/* Matrix products for the machine that compiles them, with GCC's and Clang's vector extensions.
 *
 * Weights lie in blocks of 16 rows; a block runs over "steps" of 4 columns, [16][4] codes each, so that one
 * 512-bit vpdpbusd (or two 256-bit pairs of vpmaddwd, ...) multiplies a step by 4 activations of 8 bits.
 * The last block may have fewer rows, and so fewer bytes in a step (`lane`, else 64): it is multiplied like the
 * others, by whatever follows, and nobody looks at those results.
 * Codes of fewer than 8 bits stay packed: `per` steps form a unit of bit planes 4, 2 and 1 bits wide, and plane
 * after plane, step s of a plane of b bits lies at bits (s * b) % 8 of the vector (s * b) / 8 of that plane.
 * Every way to multiply gives the same integers; floats are added in one order per target, not in all.
 */
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define WIDTH 64
#define TILE 4 /* blocks of rows, and rows of activations, that share registers */
#elif defined(__AVX2__)
#define WIDTH 32
#define TILE 2
#else
#define WIDTH 16
#define TILE 1
#endif
#define PARTS (64 / WIDTH)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef int32_t i32v __attribute__((vector_size(WIDTH)));
typedef uint16_t u16v __attribute__((vector_size(WIDTH)));
typedef int16_t i16v __attribute__((vector_size(WIDTH)));
typedef int8_t i8v __attribute__((vector_size(WIDTH)));
typedef uint8_t u8v __attribute__((vector_size(WIDTH)));
typedef float f32v __attribute__((vector_size(WIDTH)));

INLINE i32v load_i32(const void *from)
{
    i32v v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE f32v load_f32(const float *from)
{
    f32v v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE i32v four_everywhere(const uint8_t *from)
{
    int32_t four;
    memcpy(&four, from, 4);
    return (i32v){0} + four;
}

/* sum + the 4 products of unsigned x and signed w in each 32-bit lane */
INLINE i32v dot(i32v sum, i32v x, i32v w)
{
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    i32v x_even = x & 0x00ff00ff, x_odd = (i32v)((u16v)x >> 8);
    i16v w_even = (i16v)((u16v)w << 8) >> 8, w_odd = (i16v)w >> 8;
#if defined(__AVX512BW__)
    return sum + (i32v)_mm512_madd_epi16((__m512i)x_even, (__m512i)w_even)
        + (i32v)_mm512_madd_epi16((__m512i)x_odd, (__m512i)w_odd);
#elif defined(__AVX2__)
    return sum + (i32v)_mm256_madd_epi16((__m256i)x_even, (__m256i)w_even)
        + (i32v)_mm256_madd_epi16((__m256i)x_odd, (__m256i)w_odd);
#elif defined(__SSE2__)
    return sum + (i32v)_mm_madd_epi16((__m128i)x_even, (__m128i)w_even)
        + (i32v)_mm_madd_epi16((__m128i)x_odd, (__m128i)w_odd);
#else
    return sum + (x_even & 0xffff) * (((i32v)w_even << 16) >> 16) + (x_even >> 16) * ((i32v)w_even >> 16)
        + (x_odd & 0xffff) * (((i32v)w_odd << 16) >> 16) + (x_odd >> 16) * ((i32v)w_odd >> 16);
#endif
#endif
}

INLINE f32v multiply_add(f32v x, f32v w, f32v sum)
{
#if defined(__AVX512BW__)
    return (f32v)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#else
    return x * w + sum;
#endif
}

/* steps of a unit: as many as fill whole bytes in the narrowest plane */
INLINE int steps_per_unit(const int bits)
{
    return bits == 8 ? 1 : bits & 1 ? 8 : bits & 2 ? 4 : 2;
}

/* signed codes, 4 for each row, of one step of a unit */
INLINE i32v codes(const int bits, const int lane, const uint8_t *unit, const int step, const int part)
{
    const int per = steps_per_unit(bits);
    u8v joined = {0};
    int done = 0;
    if (bits == 8) return load_i32(unit + part * WIDTH);
    UNROLL for (int width = 4; width > 0; width >>= 1) {
        if (!(bits & width)) continue;
        const uint8_t *plane = unit + lane * per * done / 8 + lane * (step * width / 8) + part * WIDTH;
        u8v piece = (u8v)((u16v)load_i32(plane) >> (step * width % 8)) & (uint8_t)((1 << width) - 1);
        joined |= (u8v)((u16v)piece << done);
        done += width;
    }
    const uint8_t half = (uint8_t)(1 << (bits - 1));
    return (i32v)((joined ^ half) - half);
}

/* y[p][0 .. 16 * blocks) = ((sum_k w x[p][k] + corrections) * gain, summed over groups) + bias
 * for `many` rows of x. Where x has more than 8 bits, x_high holds the upper bytes. */
INLINE void integer_tile(const int many, const int blocks, const int bits, const int lane, const int columns,
                         const int group, const uint8_t *x, const uint8_t *x_high, const long x_step, const uint8_t *w,
                         const int32_t *corrections, const float *gain, const float *bias, float *y,
                         const long y_step)
{
    const int per = steps_per_unit(bits), unit_bytes = lane * bits * per / 8;
    const int groups = (columns + group - 1) / group;
    const int group_units = (group + 4 * per - 1) / (4 * per);
    const int last_units = (columns - (groups - 1) * group + 4 * per - 1) / (4 * per);
    const long block_bytes = (long)((groups - 1) * group_units + last_units) * unit_bytes;
    const int chains = many * blocks >= 4 || per > 1 ? 1 : 4 / (many * blocks); /* sums in flight hide latency */
    f32v total[4][4][PARTS];
    for (int g = 0; g < groups; ++g) {
        const int units = g == groups - 1 ? last_units : group_units;
        i32v sum[4][4][PARTS][4], high[4][4][PARTS];
        UNROLL for (int p = 0; p < many; ++p)
        UNROLL for (int r = 0; r < blocks; ++r)
        UNROLL for (int h = 0; h < PARTS; ++h) {
            UNROLL for (int c = 1; c < chains; ++c) sum[p][r][h][c] = (i32v){0};
            sum[p][r][h][0] = corrections ? load_i32(corrections + 16 * (r * groups + g) + h * (WIDTH / 4)) : (i32v){0};
            high[p][r][h] = (i32v){0};
        }
        int u = 0;
        for (; u + chains <= units; u += chains)
        UNROLL for (int c = 0; c < chains; ++c)
        UNROLL for (int s = 0; s < per; ++s)
        UNROLL for (int h = 0; h < PARTS; ++h)
        UNROLL for (int r = 0; r < blocks; ++r) {
            i32v now = codes(bits, lane, w + r * block_bytes + (long)(u + c) * unit_bytes, s, h);
            UNROLL for (int p = 0; p < many; ++p) {
                const long at = p * x_step + g * group + 4 * ((u + c) * per + s);
                sum[p][r][h][c] = dot(sum[p][r][h][c], four_everywhere(x + at), now);
                if (x_high) high[p][r][h] = dot(high[p][r][h], four_everywhere(x_high + at), now);
            }
        }
        if (chains > 1)
        for (; u < units; ++u)
        UNROLL for (int h = 0; h < PARTS; ++h)
        UNROLL for (int r = 0; r < blocks; ++r) {
            i32v now = codes(bits, lane, w + r * block_bytes + (long)u * unit_bytes, 0, h);
            UNROLL for (int p = 0; p < many; ++p) {
                const long at = p * x_step + g * group + 4 * u;
                sum[p][r][h][0] = dot(sum[p][r][h][0], four_everywhere(x + at), now);
                if (x_high) high[p][r][h] = dot(high[p][r][h], four_everywhere(x_high + at), now);
            }
        }
        UNROLL for (int p = 0; p < many; ++p)
        UNROLL for (int r = 0; r < blocks; ++r)
        UNROLL for (int h = 0; h < PARTS; ++h) {
            UNROLL for (int c = 1; c < chains; ++c) sum[p][r][h][0] += sum[p][r][h][c];
            if (x_high) sum[p][r][h][0] += high[p][r][h] << 8;
            f32v part = __builtin_convertvector(sum[p][r][h][0], f32v);
            part = part * load_f32(gain + 16 * (r * groups + g) + h * (WIDTH / 4));
            total[p][r][h] = g ? total[p][r][h] + part : part;
        }
        w += (long)units * unit_bytes;
    }
    UNROLL for (int p = 0; p < many; ++p)
    UNROLL for (int r = 0; r < blocks; ++r)
    UNROLL for (int h = 0; h < PARTS; ++h) {
        f32v result = total[p][r][h] + load_f32(bias + 16 * r + h * (WIDTH / 4));
        memcpy(y + p * y_step + 16 * r + h * (WIDTH / 4), &result, sizeof result);
    }
}

/* The same for float x: float32 weights lie as [columns][16] in a block, codes as above. */
INLINE void float_tile(const int many, const int blocks, const int bits, const int lane, const int columns,
                       const int group, const float *x, const long x_step, const uint8_t *w, const float *gain, const float *bias,
                       float *y, const long y_step)
{
    const int per = steps_per_unit(bits), groups = (columns + group - 1) / group;
    const int span = 4 * per, unit_bytes = lane * bits * per / 8;
    const int group_units = (group + span - 1) / span;
    const int last_units = (columns - (groups - 1) * group + span - 1) / span;
    const long block_bytes = bits == 32 ? (long)lane * columns : (long)((groups - 1) * group_units + last_units) * unit_bytes;
    const int chains = bits == 32 && many * blocks < 4 ? 4 / (many * blocks) : 1;
    f32v total[4][4][PARTS];
    for (int g = 0; g < groups; ++g) {
        const int first = g * group, end = g == groups - 1 ? columns : first + group;
        f32v sum[4][4][PARTS][4];
        UNROLL for (int p = 0; p < many; ++p)
        UNROLL for (int r = 0; r < blocks; ++r)
        UNROLL for (int h = 0; h < PARTS; ++h)
        UNROLL for (int c = 0; c < chains; ++c) sum[p][r][h][c] = (f32v){0};
        if (bits == 32) {
            int k = first;
            for (; k + chains <= end; k += chains)
            UNROLL for (int c = 0; c < chains; ++c)
            UNROLL for (int h = 0; h < PARTS; ++h)
            UNROLL for (int r = 0; r < blocks; ++r) {
                f32v now = load_f32((const float *)(w + r * block_bytes + lane * (k + c)) + h * (WIDTH / 4));
                UNROLL for (int p = 0; p < many; ++p)
                    sum[p][r][h][c] = multiply_add((f32v){0} + x[p * x_step + k + c], now, sum[p][r][h][c]);
            }
            for (; k < end; ++k)
            UNROLL for (int h = 0; h < PARTS; ++h)
            UNROLL for (int r = 0; r < blocks; ++r) {
                f32v now = load_f32((const float *)(w + r * block_bytes + lane * k) + h * (WIDTH / 4));
                UNROLL for (int p = 0; p < many; ++p)
                    sum[p][r][h][0] = multiply_add((f32v){0} + x[p * x_step + k], now, sum[p][r][h][0]);
            }
        } else {
            const uint8_t *unit = w;
            for (int k = first; k < end; k += span, unit += unit_bytes)
            UNROLL for (int s = 0; s < per; ++s)
            UNROLL for (int h = 0; h < PARTS; ++h)
            UNROLL for (int r = 0; r < blocks; ++r) {
                i32v now = codes(bits, lane, unit + r * block_bytes, s, h);
                UNROLL for (int j = 0; j < 4; ++j) {
                    if (k + 4 * s + j >= end) continue;
                    f32v code = __builtin_convertvector((now << (24 - 8 * j)) >> 24, f32v);
                    UNROLL for (int p = 0; p < many; ++p)
                        sum[p][r][h][0] = multiply_add((f32v){0} + x[p * x_step + k + 4 * s + j], code, sum[p][r][h][0]);
                }
            }
            w = unit;
        }
        UNROLL for (int p = 0; p < many; ++p)
        UNROLL for (int r = 0; r < blocks; ++r)
        UNROLL for (int h = 0; h < PARTS; ++h) {
            UNROLL for (int c = 1; c < chains; ++c) sum[p][r][h][0] += sum[p][r][h][c];
            if (bits != 32) sum[p][r][h][0] *= load_f32(gain + 16 * (r * groups + g) + h * (WIDTH / 4));
            total[p][r][h] = g ? total[p][r][h] + sum[p][r][h][0] : sum[p][r][h][0];
        }
    }
    UNROLL for (int p = 0; p < many; ++p)
    UNROLL for (int r = 0; r < blocks; ++r)
    UNROLL for (int h = 0; h < PARTS; ++h) {
        f32v result = total[p][r][h] + load_f32(bias + 16 * r + h * (WIDTH / 4));
        memcpy(y + p * y_step + 16 * r + h * (WIDTH / 4), &result, sizeof result);
    }
}

/* of whole blocks */
INLINE long bytes_per_block(const int bits, const int columns, const int group)
{
    const int span = 4 * steps_per_unit(bits), groups = (columns + group - 1) / group;
    const int last = columns - (groups - 1) * group;
    if (bits == 32) return 64L * columns;
    return ((long)(groups - 1) * ((group + span - 1) / span) + (last + span - 1) / span) * 2 * bits * span;
}

INLINE void integer_product(const int many, const int rows, const int bits, const int columns, const int group,
                            const uint8_t *x, const uint8_t *x_high, const long x_step, const uint8_t *w,
                            const int32_t *corrections, const float *gain, const float *bias, float *y,
                            const long y_step)
{
    const int blocks = rows / 16, groups = (columns + group - 1) / group;
    const long bytes = bytes_per_block(bits, columns, group);
    int r = 0;
#define BLOCKS(count, lane)                                                                                     \
    integer_tile(many, count, bits, lane, columns, group, x, x_high, x_step, w + r * bytes,                           \
                 corrections ? corrections + 16 * groups * r : 0, gain + 16 * groups * r, bias + 16 * r,        \
                 y + 16 * r, y_step)
    for (; r + TILE <= blocks; r += TILE) BLOCKS(TILE, 64);
    if (TILE > 2 && blocks % TILE >= 2) { BLOCKS(2, 64); r += 2; }
    if (TILE > 1 && blocks % 2 == 1) { BLOCKS(1, 64); ++r; }
    if (rows % 16) BLOCKS(1, rows % 16 * 4);
#undef BLOCKS
}

INLINE void float_product(const int many, const int rows, const int bits, const int columns, const int group,
                          const float *x, const long x_step, const uint8_t *w, const float *gain,
                          const float *bias, float *y, const long y_step)
{
    const int blocks = rows / 16, groups = (columns + group - 1) / group;
    const long bytes = bytes_per_block(bits, columns, group);
    int r = 0;
#define BLOCKS(count, lane)                                                                                     \
    float_tile(many, count, bits, lane, columns, group, x, x_step, w + r * bytes, gain + 16 * groups * r,             \
               bias + 16 * r, y + 16 * r, y_step)
    for (; r + TILE <= blocks; r += TILE) BLOCKS(TILE, 64);
    if (TILE > 2 && blocks % TILE >= 2) { BLOCKS(2, 64); r += 2; }
    if (TILE > 1 && blocks % 2 == 1) { BLOCKS(1, 64); ++r; }
    if (rows % 16) BLOCKS(1, rows % 16 * 4);
#undef BLOCKS
}
