/* Baby Dragon Hatchling in C11, a port for the conformance suite: one case of vectors in, everything it computes out.

     cc -std=c11 -O2 -DREAL=float bdh.c -o bdh -lm        (or -DREAL=double)
     ./bdh VECTORS/CASE OUTPUTS/CASE                      (the second folder must exist)

   Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary, L layers.
   Arrays are row-major; the rules R1 to R15 are those of the specification. Memory is given back by the end of the program. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#define EPS 1e-5
#define IGNORE -100
#define MAX_TENSORS 128
#define MAX_DECODES 8
static const double TURN = 6.283185307179586476925;

/* ---- the case: case.txt and raw files ---- */

static int L, D, nh, N, V, B, T, positions, draws, choices, float32_phases, are_int8;
static char decode_lines[MAX_DECODES][512];
static int decodes;
static const char *inputs, *outputs;
static real *embedding, *encoder, *encoder_v, *decoder, *lm_head;
static int64_t *tokens, *targets;

static void *reserve(size_t count, size_t size) {
    void *memory = calloc(count + 1, size);
    if (!memory) { fprintf(stderr, "bdh: out of memory\n"); exit(2); }
    return memory;
}

static real *zeros(size_t count) { return reserve(count, sizeof(real)); }

static FILE *open_file(const char *folder, const char *name, const char *suffix, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s%s", folder, name, suffix);
    FILE *file = fopen(path, mode);
    if (!file) { perror(path); exit(2); }
    return file;
}

static void *load(const char *name, size_t count, size_t size) {
    FILE *file = open_file(inputs, name, "", "rb");
    void *values = reserve(count, size);
    if (fread(values, size, count, file) != count) { fprintf(stderr, "bdh: %s is too short\n", name); exit(2); }
    fclose(file);
    return values;
}

/* A weight whose middle axis is the one that an output is summed over: values in int8 share a scale along it (R17). */
static real *load_weights(const char *name, size_t outer, size_t summed, size_t inner) {
    size_t count = outer * summed * inner;
    char values_in[256], scales_in[256];
    snprintf(values_in, sizeof values_in, "raw/params.%s.%s", name, are_int8 ? "i8" : "f32");
    snprintf(scales_in, sizeof scales_in, "raw/params.%s.scale.f32", name);
    const float *floats = are_int8 ? NULL : load(values_in, count, sizeof *floats);
    const int8_t *values = are_int8 ? load(values_in, count, sizeof *values) : NULL;
    const float *scales = are_int8 ? load(scales_in, outer * inner, sizeof *scales) : NULL;
    real *weights = zeros(count);
    for (size_t i = 0; i < count; i++)
        weights[i] = are_int8 ? (real)values[i] * scales[i / (summed * inner) * inner + i % inner] : floats[i];
    return weights;
}

static void store_as(const char *name, const char *suffix, const void *values, size_t count, size_t size) {
    FILE *file = open_file(outputs, name, suffix, "wb");
    if (fwrite(values, size, count, file) != count || fclose(file)) { perror(name); exit(2); }
}

static void store(const char *name, const real *values, size_t count) {
    store_as(name, sizeof(real) == 4 ? ".f32" : ".f64", values, count, sizeof(real));
}

static void store_of_layer(const char *prefix, int layer, const char *stage, const real *values, size_t count) {
    char name[256];
    snprintf(name, sizeof name, "%slayers.%d.%s", prefix, layer, stage);
    store(name, values, count);
}

static void read_case(void) {
    const struct { const char *word; int *value; } sizes[] = {
        {"n_layer", &L}, {"n_embd", &D}, {"n_head", &nh}, {"n_neurons", &N}, {"vocab_size", &V}, {"batch", &B}, {"time", &T},
        {"positions", &positions}, {"draws", &draws}, {"choices", &choices},
    };
    FILE *file = open_file(inputs, "case", ".txt", "r");
    char line[512], word[64], value[256];
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s %255s", word, value) != 2) continue;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            if (!strcmp(word, sizes[i].word)) *sizes[i].value = atoi(value);
        if (!strcmp(word, "input") && !strcmp(value, "params.embed")) are_int8 = strstr(line, " i8 ") != NULL;
        if (!strcmp(word, "phase")) float32_phases = !strcmp(value, "float32");
        if (!strcmp(word, "decode") && decodes < MAX_DECODES) strcpy(decode_lines[decodes++], line + strlen("decode "));
    }
    fclose(file);
    embedding = load_weights("embed", V, D, 1);
    encoder = load_weights("encoder", nh, D, N);
    encoder_v = load_weights("encoder_v", nh, D, N);
    decoder = load_weights("decoder", 1, (size_t)nh * N, D);
    lm_head = load_weights("lm_head", 1, D, V);
    tokens = load("raw/tokens.i64", (size_t)B * T, 8);
    targets = load("raw/targets.i64", (size_t)B * T, 8);
}

/* ---- R2, R4 and products ---- */

/* out (n, m) += a (n, k) b (k, m). Each matrix has a step between rows and one between columns: a transpose costs no copy. */
static void add_product(real *out, int n, int k, int m,
                        const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row, size_t b_col) {
    for (int i = 0; i < n; i++)
        for (int j = 0; j < m; j++) {
            real sum = 0;
            for (int l = 0; l < k; l++) sum += a[i * a_row + l * a_col] * b[l * b_row + j * b_col];
            out[(size_t)i * m + j] += sum;
        }
}

/* The mean of x (D) and one over its standard deviation. */
static void moments(const real *x, real *mean, real *scale) {
    real sum = 0, squares = 0;
    for (int d = 0; d < D; d++) sum += x[d];
    *mean = sum / D;
    for (int d = 0; d < D; d++) squares += (x[d] - *mean) * (x[d] - *mean);
    *scale = 1 / (real)sqrt(squares / D + EPS);
}

static void layer_norm(real *out, const real *x, size_t rows) {
    for (size_t r = 0; r < rows; r++, out += D, x += D) {
        real mean, scale;
        moments(x, &mean, &scale);
        for (int d = 0; d < D; d++) out[d] = (x[d] - mean) * scale;
    }
}

/* Undo layer_norm at x: the slope in x, given the slope in the result. */
static void layer_norm_gradient(real *d_x, const real *d_y, const real *x, size_t rows) {
    for (size_t r = 0; r < rows; r++, d_x += D, d_y += D, x += D) {
        real mean, scale, along_mean = 0, along_y = 0;
        moments(x, &mean, &scale);
        for (int d = 0; d < D; d++) {
            along_mean += d_y[d] / D;
            along_y += d_y[d] * (x[d] - mean) * scale / D;
        }
        for (int d = 0; d < D; d++) d_x[d] = scale * (d_y[d] - along_mean - (x[d] - mean) * scale * along_y);
    }
}

/* Turns per token of neuron n: every operation rounded to float32, as published models had it. */
static float frequency(int n) {
    float pair = (float)(n / 2 * 2) / (float)N;
    float growth = (float)pow(65536.0, (double)pair);
    return 1.0f / growth / (float)TURN;
}

/* Cosine and sine of neuron n at a position. A product of 64-bit fixed point drops whole turns by itself. */
static void rotation(uint64_t position, int n, real *cosine, real *sine) {
    float f = frequency(n);
    double turns = (double)(position * (uint64_t)((double)f * 0x1p64)) * 0x1p-64;
    if (float32_phases) turns = fmodf((float)position * f, 1.0f);
    *cosine = (real)cos(TURN * turns);
    *sine = (real)sin(TURN * turns);
}

/* Turn each pair of neurons of v (T, N) by its phase, forwards or back. */
static void rope(real *out, const real *v, uint64_t start, int length, int direction) {
    for (int t = 0; t < length; t++, out += N, v += N)
        for (int n = 0; n < N; n += 2) {
            real c, s;
            rotation(start + t, n, &c, &s);
            s *= direction;
            out[n] = v[n] * c - v[n + 1] * s;
            out[n + 1] = v[n + 1] * c + v[n] * s;
        }
}

/* ---- one layer, forwards ---- */

struct stages { real *x_sparse, *rotated, *scores, *attention, *yKV, *y_sparse, *xy_sparse, *decoded, *y, *x; };

static void relu(real *x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] : 0;
}

/* Run a layer on x (B, length, D), of which the first token stands at start. memory (B, nh, N, D) holds what came before: it
   is read first and then takes the new tokens in; NULL if there is none. */
static struct stages layer(const real *x, int length, uint64_t start, real *memory) {
    size_t wide = (size_t)B * nh * length * N, narrow = (size_t)B * nh * length * D, out = (size_t)B * length * D;
    struct stages s = {zeros(wide), zeros(wide), zeros((size_t)B * nh * length * length), zeros(narrow), zeros(narrow),
                       zeros(wide), zeros(wide), zeros(out), zeros(out), zeros(out)};
    for (int b = 0; b < B; b++) {
        const real *xb = x + (size_t)b * length * D;
        for (int h = 0; h < nh; h++) {
            size_t bh = (size_t)b * nh + h, at = bh * length * N, head = (size_t)h * D * N;
            real *rotated = s.rotated + at, *scores = s.scores + bh * length * length, *seen = s.attention + bh * length * D;
            add_product(s.x_sparse + at, length, D, N, xb, D, 1, encoder + head, N, 1);  /* R3 */
            relu(s.x_sparse + at, (size_t)length * N);
            rope(rotated, s.x_sparse + at, start, length, 1);
            for (int t = 0; t < length; t++)  /* R5: strictly earlier tokens only */
                for (int u = 0; u < t; u++)
                    add_product(scores + t * length + u, 1, N, 1, rotated + (size_t)t * N, N, 1, rotated + (size_t)u * N, 1, N);
            add_product(seen, length, length, D, scores, length, 1, xb, D, 1);
            if (memory) {  /* R13: read before write */
                add_product(seen, length, N, D, rotated, N, 1, memory + bh * N * D, D, 1);
                add_product(memory + bh * N * D, N, length, D, rotated, 1, N, xb, D, 1);
            }
            layer_norm(s.yKV + bh * length * D, seen, length);  /* R6 */
            add_product(s.y_sparse + at, length, D, N, s.yKV + bh * length * D, D, 1, encoder_v + head, N, 1);  /* R7 */
            relu(s.y_sparse + at, (size_t)length * N);
            for (size_t i = at; i < at + (size_t)length * N; i++) s.xy_sparse[i] = s.x_sparse[i] * s.y_sparse[i];
            real *decoded = s.decoded + (size_t)b * length * D;  /* R9: heads side by side, head-major */
            add_product(decoded, length, N, D, s.xy_sparse + at, N, 1, decoder + (size_t)h * N * D, D, 1);
        }
    }
    layer_norm(s.y, s.decoded, (size_t)B * length);  /* R9 */
    real *sum = zeros(out);
    for (size_t i = 0; i < out; i++) sum[i] = x[i] + s.y[i];
    layer_norm(s.x, sum, (size_t)B * length);  /* R10 */
    return s;
}

/* R1: tokens from..from+length of every text, looked up (B, length, D). */
static real *look_up(int from, int length) {
    real *x = zeros((size_t)B * length * D);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < length; t++)
            for (int d = 0; d < D; d++) x[((size_t)b * length + t) * D + d] = embedding[tokens[b * T + from + t] * D + d];
    return x;
}

/* R1: looked up and normalised. */
static real *embed(int from, int length) {
    real *looked_up = look_up(from, length), *x = zeros((size_t)B * length * D);
    layer_norm(x, looked_up, (size_t)B * length);
    return x;
}

/* R11: x (B, length, D) to logits (B, length, V). */
static real *readout(const real *x, int length) {
    real *logits = zeros((size_t)B * length * V);
    add_product(logits, B * length, D, V, x, D, 1, lm_head, V, 1);
    return logits;
}

/* ---- the parallel form: all stages, the loss, the gradients ---- */

static void store_stages(int i, const struct stages *s) {
    size_t wide = (size_t)B * nh * T * N, narrow = (size_t)B * nh * T * D, out = (size_t)B * T * D;
    store_of_layer("", i, "x_sparse", s->x_sparse, wide);
    store_of_layer("", i, "rotated", s->rotated, wide);
    store_of_layer("", i, "scores", s->scores, (size_t)B * nh * T * T);
    store_of_layer("", i, "attention", s->attention, narrow);
    store_of_layer("", i, "yKV", s->yKV, narrow);
    store_of_layer("", i, "y_sparse", s->y_sparse, wide);
    store_of_layer("", i, "xy_sparse", s->xy_sparse, wide);
    store_of_layer("", i, "decoded", s->decoded, out);
    store_of_layer("", i, "y", s->y, out);
    store_of_layer("", i, "x", s->x, out);
}

/* R12: the mean loss, and its slope in the logits (B, T, V). */
static real cross_entropy(const real *logits, real *d_logits) {
    real sum = 0;
    int counted = 0;
    for (int t = 0; t < B * T; t++) counted += targets[t] != IGNORE;
    for (int t = 0; t < B * T; t++, logits += V, d_logits += V) {
        if (targets[t] == IGNORE) continue;
        real largest = logits[0], total = 0;
        for (int v = 1; v < V; v++) largest = logits[v] > largest ? logits[v] : largest;
        for (int v = 0; v < V; v++) total += (real)exp(logits[v] - largest);
        sum += (real)log(total) + largest - logits[targets[t]];
        for (int v = 0; v < V; v++) d_logits[v] = ((real)exp(logits[v] - largest) / total - (v == targets[t])) / counted;
    }
    return sum / counted;
}

static struct { real *embed, *encoder, *encoder_v, *decoder, *lm_head; } slopes;

/* R15: undo a layer that read x (B, T, D) and computed s: add to slopes, return the slope in x. */
static real *layer_gradient(const real *d_out, const real *x, const struct stages *s) {
    size_t out = (size_t)B * T * D, TN = (size_t)T * N, TD = (size_t)T * D, DN = (size_t)D * N;
    real *sum = zeros(out), *d_x = zeros(out), *d_decoded = zeros(out);
    for (size_t i = 0; i < out; i++) sum[i] = x[i] + s->y[i];
    layer_norm_gradient(d_x, d_out, sum, (size_t)B * T);
    layer_norm_gradient(d_decoded, d_x, s->decoded, (size_t)B * T);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < nh; h++) {
            size_t bh = (size_t)b * nh + h, at = bh * TN, TT = (size_t)T * T;
            const real *x_sparse = s->x_sparse + at, *y_sparse = s->y_sparse + at, *scores = s->scores + bh * TT;
            const real *xb = x + b * TD;
            real *d_xy = zeros(TN), *d_y = zeros(TN), *d_yKV = zeros(TD), *d_attention = zeros(TD), *d_scores = zeros(TT);
            real *d_rotated = zeros(TN), *d_x_sparse = zeros(TN);
            add_product(slopes.decoder + h * DN, N, T, D, s->xy_sparse + at, 1, N, d_decoded + b * TD, D, 1);
            add_product(d_xy, T, D, N, d_decoded + b * TD, D, 1, decoder + h * DN, 1, D);
            for (size_t i = 0; i < TN; i++) d_y[i] = y_sparse[i] > 0 ? d_xy[i] * x_sparse[i] : 0;
            add_product(slopes.encoder_v + h * DN, D, T, N, s->yKV + bh * TD, 1, D, d_y, N, 1);
            add_product(d_yKV, T, N, D, d_y, N, 1, encoder_v + h * DN, 1, N);
            layer_norm_gradient(d_attention, d_yKV, s->attention + bh * TD, T);
            for (int t = 0; t < T; t++)
                for (int u = 0; u < t; u++) {  /* K is Q: a row counts as both */
                    add_product(d_scores + t * T + u, 1, D, 1, d_attention + (size_t)t * D, D, 1, xb + (size_t)u * D, 1, D);
                    d_scores[u * T + t] = d_scores[t * T + u];
                }
            add_product(d_rotated, T, T, N, d_scores, T, 1, s->rotated + at, N, 1);
            rope(d_x_sparse, d_rotated, 0, T, -1);
            for (size_t i = 0; i < TN; i++) d_x_sparse[i] = x_sparse[i] > 0 ? d_x_sparse[i] + d_xy[i] * y_sparse[i] : 0;
            add_product(slopes.encoder + h * DN, D, T, N, xb, 1, D, d_x_sparse, N, 1);
            add_product(d_x + b * TD, T, T, D, scores, 1, T, d_attention, D, 1);
            add_product(d_x + b * TD, T, N, D, d_x_sparse, N, 1, encoder + h * DN, 1, N);
        }
    return d_x;
}

static void parallel(void) {
    struct stages *layers = reserve(L, sizeof *layers);
    real *embedded = embed(0, T), *x = embedded;
    store("embed", x, (size_t)B * T * D);
    for (int i = 0; i < L; i++) {
        layers[i] = layer(x, T, 0, NULL);
        store_stages(i, &layers[i]);
        x = layers[i].x;
    }
    real *logits = readout(x, T), *d_logits = zeros((size_t)B * T * V), *d_x = zeros((size_t)B * T * D);
    real loss = cross_entropy(logits, d_logits);
    store("logits", logits, (size_t)B * T * V);
    store("loss", &loss, 1);

    size_t width = (size_t)nh * N * D;
    slopes.embed = zeros((size_t)V * D), slopes.lm_head = zeros((size_t)D * V);
    slopes.encoder = zeros(width), slopes.encoder_v = zeros(width), slopes.decoder = zeros(width);
    add_product(slopes.lm_head, D, B * T, V, x, 1, D, d_logits, V, 1);
    add_product(d_x, B * T, V, D, d_logits, V, 1, lm_head, 1, V);
    for (int i = L - 1; i >= 0; i--) d_x = layer_gradient(d_x, i ? layers[i - 1].x : embedded, &layers[i]);
    real *d_looked_up = zeros((size_t)B * T * D);
    layer_norm_gradient(d_looked_up, d_x, look_up(0, T), (size_t)B * T);
    for (int t = 0; t < B * T; t++)
        for (int d = 0; d < D; d++) slopes.embed[tokens[t] * D + d] += d_looked_up[(size_t)t * D + d];
    store("gradients.embed", slopes.embed, (size_t)V * D);
    store("gradients.encoder", slopes.encoder, width);
    store("gradients.encoder_v", slopes.encoder_v, width);
    store("gradients.decoder", slopes.decoder, width);
    store("gradients.lm_head", slopes.lm_head, (size_t)D * V);
}

/* ---- the recurrent form: one line of case.txt, "start length length ..." ---- */

static void decode(char *plan) {
    const char *word = strtok(plan, " \n");
    char prefix[64], name[128];
    uint64_t start = strtoull(word, NULL, 10);
    snprintf(prefix, sizeof prefix, "decode.%s.", word);
    real **memories = reserve(L, sizeof *memories), *all = zeros((size_t)B * T * V);
    for (int i = 0; i < L; i++) memories[i] = zeros((size_t)B * nh * N * D);
    for (int from = 0, length; (word = strtok(NULL, " \n")); from += length) {
        length = atoi(word);
        real *x = embed(from, length);
        for (int i = 0; i < L; i++) x = layer(x, length, start + from, memories[i]).x;
        const real *logits = readout(x, length);
        for (int b = 0; b < B; b++)
            memcpy(all + ((size_t)b * T + from) * V, logits + (size_t)b * length * V, (size_t)length * V * sizeof(real));
    }
    snprintf(name, sizeof name, "%slogits", prefix);
    store(name, all, (size_t)B * T * V);
    for (int i = 0; i < L; i++) store_of_layer(prefix, i, "state", memories[i], (size_t)B * nh * N * D);
}

/* ---- phases at long positions, and sampling ---- */

static void phases(void) {
    const uint64_t *at = load("raw/phases.positions.u64", positions, 8);
    float *table = reserve(N, sizeof *table);
    real *cosines = zeros((size_t)positions * N), *sines = zeros((size_t)positions * N);
    for (int n = 0; n < N; n++) {
        table[n] = frequency(n);
        for (int p = 0; p < positions; p++) rotation(at[p], n, &cosines[(size_t)p * N + n], &sines[(size_t)p * N + n]);
    }
    store_as("frequencies", ".f32", table, N, sizeof *table);
    store("phases.cos", cosines, (size_t)positions * N);
    store("phases.sin", sines, (size_t)positions * N);
}

/* The upper and the lower half of a 128-bit product. */
static uint64_t multiply(uint64_t a, uint64_t b, uint64_t *low) {
    uint64_t a_low = (uint32_t)a, a_high = a >> 32, b_low = (uint32_t)b, b_high = b >> 32;
    uint64_t middle = a_high * b_low + (a_low * b_low >> 32), cross = a_low * b_high + (uint32_t)middle;
    *low = a * b;
    return a_high * b_high + (middle >> 32) + (cross >> 32);
}

/* R14: the first word of Philox4x64-10, 53 bits of it. */
static double uniform(uint64_t seed, uint64_t position, uint64_t row) {
    uint64_t c[4] = {1, 0, position, row}, key[2] = {seed, 0};
    for (int round = 0; round < 10; round++) {
        uint64_t low0, high0 = multiply(0xD2E7470EE14C6C93u, c[0], &low0);
        uint64_t low1, high1 = multiply(0xCA5A826395121157u, c[2], &low1);
        uint64_t next[4] = {high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0};
        memcpy(c, next, sizeof c);
        key[0] += 0x9E3779B97F4A7C15u;
        key[1] += 0xBB67AE8584CAA73Bu;
    }
    return (double)(c[0] >> 11) * 0x1p-53;
}

/* One token from logits by inverse CDF: only the top_k best, all that tie with the last of them included; 0 means all. */
static int64_t sample(const double *logits, double draw, double temperature, int64_t top_k) {
    double weights[64], total = 0, edge = 0;
    int best = 0;
    for (int v = 1; v < choices; v++) best = logits[v] > logits[best] ? v : best;
    if (temperature == 0) return best;
    for (int v = 0; v < choices; v++) {
        int better = 0;
        for (int u = 0; u < choices; u++) better += logits[u] > logits[v];
        weights[v] = top_k && better >= top_k ? 0 : exp((logits[v] - logits[best]) / temperature);
        total += weights[v];
    }
    for (int v = 0; v < choices; v++)
        if (draw * total < (edge += weights[v])) return v;
    return best;
}

static void sampling(void) {
    const double *logits = load("raw/sampling.logits.f64", (size_t)draws * choices, 8);
    const double *temperature = load("raw/sampling.temperature.f64", draws, 8);
    const int64_t *top_k = load("raw/sampling.top_k.i64", draws, 8);
    const uint64_t *seed = load("raw/sampling.seed.u64", draws, 8), *row = load("raw/sampling.row.u64", draws, 8);
    const uint64_t *position = load("raw/sampling.position.u64", draws, 8);
    double *uniforms = reserve(draws, 8);
    int64_t *chosen = reserve(draws, 8);
    for (int i = 0; i < draws; i++) {
        uniforms[i] = uniform(seed[i], position[i], row[i]);
        chosen[i] = sample(logits + (size_t)i * choices, uniforms[i], temperature[i], top_k[i]);
    }
    store_as("sampling.uniforms", ".f64", uniforms, draws, 8);
    store_as("sampling.tokens", ".i64", chosen, draws, 8);
}

int main(int count, char **words) {
    if (count != 3) { fprintf(stderr, "usage: bdh VECTORS/CASE OUTPUTS/CASE\n"); return 2; }
    inputs = words[1], outputs = words[2];
    read_case();
    phases();
    parallel();
    for (int i = 0; i < decodes; i++) decode(decode_lines[i]);
    sampling();
    return 0;
}
