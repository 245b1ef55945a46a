/* What is done to every neuron between two products, each in one pass over memory. elements.py says what and has the same in
 * PyTorch's operations, which take a pass each; native.py compiles this, for float32 or with -DBFLOAT16.
 *
 * A matrix is rows of pairs of neurons, n pairs of which are worked on; its step is how many words a row is behind the one before.
 * Neurons are widened to float, and NaN stays NaN. A phase is the cosine and the sine of a pair's turn: `local` has a row of them
 * for each of the C places in a text, and rows of neurons take these over and over; `shift`, if it is there, turns all on.
 */
#include <stdint.h>
#include <string.h>

typedef int64_t Size;
typedef struct { float even, odd; } Pair;

#ifdef BFLOAT16
typedef uint32_t Word; /* a pair: the even neuron in the low half, as memory has them */
enum { WORDS = 1 };    /* of a pair */

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, and of two as near to the even one. */
static inline uint32_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

static inline Pair pair_at(const Word *words) { return (Pair){of_bits(*words << 16), of_bits(*words & 0xffff0000u)}; }
static inline void put(Word *words, float even, float odd) { *words = narrowed(even) | narrowed(odd) << 16; }
#else
typedef float Word; /* a neuron */
enum { WORDS = 2 };

static inline Pair pair_at(const Word *words) { return (Pair){words[0], words[1]}; }
static inline void put(Word *words, float even, float odd) { words[0] = even, words[1] = odd; }
#endif

static inline float relu(float value) { return value < 0 ? 0 : value; }

static inline Pair turned(Pair pair, const float *phase, const float *shift) {
    float cosine = phase[0], sine = phase[1];
    if (shift) {
        float before = cosine;
        cosine = before * shift[0] - sine * shift[1], sine = before * shift[1] + sine * shift[0];
    }
    return (Pair){pair.even * cosine - pair.odd * sine, pair.even * sine + pair.odd * cosine};
}

/* A row is a function that is inlined twice, with and without what may be null: a question within it would keep its loop from being
 * made of vectors. */
#define ROW static inline __attribute__((always_inline)) void
/* Rows are shared out among threads unless waking them would take longer. */
#define EACH_ROW _Pragma("omp parallel for schedule(static) if (rows * n > 8192)") for (Size row = 0; row < rows; row++)

ROW relu_and_turn_row(Word *restrict x, Word *restrict q, const float *restrict phases, const float *shift, Size n) {
    for (Size i = 0; i < n; i++) {
        Pair pair = pair_at(x + WORDS * i);
        pair = (Pair){relu(pair.even), relu(pair.odd)};
        put(x + WORDS * i, pair.even, pair.odd);
        pair = turned(pair, phases + 2 * i, shift ? shift + 2 * i : 0);
        put(q + WORDS * i, pair.even, pair.odd);
    }
}

/* R3 and R4: neurons become their relu, and what these are when they are turned goes to out. */
void relu_and_turn(Word *neurons, Size step, Word *out, Size out_step, const float *local, Size local_step, const float *shift,
                   Size C, Size rows, Size n) {
    EACH_ROW {
        Word *x = neurons + row * step, *q = out + row * out_step;
        const float *phases = local + row % C * local_step;
        if (shift) relu_and_turn_row(x, q, phases, shift, n);
        else relu_and_turn_row(x, q, phases, 0, n);
    }
}

ROW gate_row(Word *restrict x, const Word *restrict y, Size n) {
    for (Size i = 0; i < n; i++) {
        Pair pair = pair_at(x + WORDS * i), open = pair_at(y + WORDS * i);
        put(x + WORDS * i, pair.even * relu(open.even), pair.odd * relu(open.odd));
    }
}

/* R7: neurons are multiplied by the relu of what opens them. */
void gate(Word *neurons, Size step, const Word *opened, Size opened_step, Size rows, Size n) {
    EACH_ROW gate_row(neurons + row * step, opened + row * opened_step, n);
}

ROW undo_gate_row(Word *restrict x, Word *restrict y, Word *restrict d, Word *restrict w, const Word *restrict mask, Size n) {
    for (Size i = 0; i < n; i++) {
        Pair pair = pair_at(x + WORDS * i), open = pair_at(y + WORDS * i), slope = pair_at(d + WORDS * i), kept = {1, 1};
        if (mask) kept = pair_at(mask + WORDS * i);
        pair = (Pair){relu(pair.even), relu(pair.odd)}, open = (Pair){relu(open.even), relu(open.odd)};
        slope = (Pair){slope.even * kept.even, slope.odd * kept.odd};
        put(x + WORDS * i, pair.even, pair.odd);
        put(y + WORDS * i, pair.even * open.even * kept.even, pair.odd * open.odd * kept.odd);
        put(w + WORDS * i, slope.even * open.even, slope.odd * open.odd);
        put(d + WORDS * i, open.even <= 0 ? 0 : slope.even * pair.even, open.odd <= 0 ? 0 : slope.odd * pair.odd);
    }
}

/* The slopes of R3, R7 and R8. Neurons become their relu; opened becomes the product of both and of the mask; slopes, in that
 * product, become those in opened; those in the neurons, by way of it, go to waiting. */
void undo_gate(Word *neurons, Size step, Word *opened, Size opened_step, Word *slopes, Size slopes_step, Word *waiting,
               Size waiting_step, const Word *mask, Size mask_step, Size rows, Size n) {
    EACH_ROW {
        Word *x = neurons + row * step, *y = opened + row * opened_step;
        Word *d = slopes + row * slopes_step, *w = waiting + row * waiting_step;
        if (mask) undo_gate_row(x, y, d, w, mask + row * mask_step, n);
        else undo_gate_row(x, y, d, w, 0, n);
    }
}

ROW undo_turn_row(Word *restrict d, const float *restrict phases, const float *shift, const Word *restrict w,
                  const Word *restrict x, Size n) {
    for (Size i = 0; i < n; i++) {
        Pair slope = turned(pair_at(d + WORDS * i), phases + 2 * i, shift ? shift + 2 * i : 0);
        Pair wait = pair_at(w + WORDS * i), pair = pair_at(x + WORDS * i);
        put(d + WORDS * i, pair.even <= 0 ? 0 : slope.even + wait.even, pair.odd <= 0 ? 0 : slope.odd + wait.odd);
    }
}

/* The slopes of R4 and R3: slopes are turned, have waiting added, and are zero where neurons are. */
void undo_turn(Word *slopes, Size step, const float *local, Size local_step, const float *shift, Size C, const Word *waiting,
               Size waiting_step, const Word *neurons, Size neurons_step, Size rows, Size n) {
    EACH_ROW {
        const float *phases = local + row % C * local_step;
        Word *d = slopes + row * step;
        const Word *w = waiting + row * waiting_step, *x = neurons + row * neurons_step;
        if (shift) undo_turn_row(d, phases, shift, w, x, n);
        else undo_turn_row(d, phases, 0, w, x, n);
    }
}
