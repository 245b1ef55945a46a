/* One token of each text: what reads large memory once, and leaves out what silent neurons would multiply. decode.py has the same in
 * PyTorch's operations; native.py compiles this, for weights in float32 or with -DBFLOAT16. Sums are cut into pieces of so many rows
 * whatever the number of threads, so that it does not change them.
 */
#include <stdint.h>
#include <string.h>

typedef int64_t Size;
enum { COLUMNS = 1024 }; /* of a sum that a thread keeps near it */

#ifdef BFLOAT16
typedef uint16_t Weight;

static inline float widened(Weight weight) {
    uint32_t bits = (uint32_t)weight << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
#else
typedef float Weight;

static inline float widened(Weight weight) { return weight; }
#endif

static inline Size least(Size a, Size b) { return a < b ? a : b; }

/* R13: a state (G, N, D) is read by rotated neurons (G, N) and then remembers with them the values (B, D) of texts, over and over;
 * what is read is added to attention (G, pieces, D). */
void through(float *state, const float *rotated, const float *values, float *attention, Size G, Size B, Size N, Size D,
             Size pieces, Size rows) {
#pragma omp parallel for collapse(2) schedule(static) if (G * N * D > 65536)
    for (Size g = 0; g < G; g++)
        for (Size piece = 0; piece < pieces; piece++) {
            const float *restrict v = values + g % B * D, *q = rotated + g * N;
            float *restrict seen = attention + (g * pieces + piece) * D;
            for (Size n = piece * rows; n < least(N, (piece + 1) * rows); n += 2) { /* a pair: an active neuron turns into the other */
                float even = q[n], odd = q[n + 1];
                if (even == 0 && odd == 0) continue;
                float *restrict a = state + (g * N + n) * D, *restrict b = a + D;
                for (Size d = 0; d < D; d++) {
                    seen[d] += even * a[d] + odd * b[d];
                    a[d] += even * v[d];
                    b[d] += odd * v[d];
                }
            }
        }
}

enum { TOGETHER = 4 }; /* rows that are added at once, so that a sum is read and written a quarter as often */

static void add_rows(float *restrict sum, const Weight *const *rows, const float *factors, Size many) {
    const Weight *restrict a = rows[0], *restrict b = rows[1], *restrict c = rows[2], *restrict d = rows[3];
    float fa = factors[0], fb = factors[1], fc = factors[2], fd = factors[3];
    for (Size i = 0; i < many; i++)
        sum[i] += fa * widened(a[i]) + fb * widened(b[i]) + (fc * widened(c[i]) + fd * widened(d[i]));
}

/* The sum of weights (R, width), each row by its factor, added to out (pieces, width). */
void weighted_sum(const Weight *weights, const float *factors, float *out, Size R, Size width, Size pieces, Size rows) {
    Size columns = (width + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for collapse(2) schedule(static) if (R * width > 65536)
    for (Size piece = 0; piece < pieces; piece++)
        for (Size column = 0; column < columns; column++) {
            Size first = column * COLUMNS, many = least(COLUMNS, width - first), last = least(R, (piece + 1) * rows), found = 0;
            const Weight *each[TOGETHER];
            float by[TOGETHER];
            for (Size row = piece * rows; row < last; row++) {
                if (factors[row] != 0) each[found] = weights + row * width + first, by[found++] = factors[row];
                if (found == TOGETHER || (found && row == last - 1)) {
                    for (; found < TOGETHER; found++) each[found] = each[0], by[found] = 0;
                    add_rows(out + piece * width + first, each, by, many);
                    found = 0;
                }
            }
        }
}
