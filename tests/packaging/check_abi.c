// Uses the C ABI from plain C11, without C++, Python or torch: dpkernels.h, the whole of it, compiles,
// libdpkernels_cpu links, and known values come out on every instruction set of this machine. Exit status 0
// when all is well.
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "dpkernels.h"

static int failures = 0;

static void check(int ok, const char* what) {
  printf("%s  %s\n", ok ? "ok    " : "FAILED", what);
  failures += !ok;
}

static void keystream_is(const char* what, const uint8_t* key, int64_t counter, const uint8_t* nonce,
                         int64_t blocks, int32_t threads, const char* hex) {
  uint8_t out[128];
  char text[2 * sizeof(out) + 1] = "";
  memset(out, 0, sizeof(out));
  const dpk_status status = dpk_cpu_chacha20_keystream(key, counter, nonce, blocks, threads, out);
  for (int64_t i = 0; i < 64 * blocks; ++i) snprintf(text + 2 * i, 3, "%02x", out[i]);
  check(status == DPK_OK && strcmp(text, hex) == 0, what);
}

// RFC 8439, section 2.3.2 and appendix A.1, test vectors 1 and 2 (two blocks of one stream).
static void chacha20(void) {
  uint8_t key[32];
  const uint8_t zero[32] = {0}, nonce[12] = {0, 0, 0, 9, 0, 0, 0, 0x4a, 0, 0, 0, 0};
  for (int i = 0; i < 32; ++i) key[i] = (uint8_t)i;
  keystream_is("ChaCha20, RFC 8439 section 2.3.2", key, 1, nonce, 1, 1,
               "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
               "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e");
  keystream_is("ChaCha20, RFC 8439 appendix A.1, vectors 1 and 2", zero, 0, zero, 2, 2,
               "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
               "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
               "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
               "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f");
}

// Sample 0: g^T x = [1*(1 2) + 2*(3 4); 0*(1 2) - 1*(3 4)] = [7 10; -3 -4], square 174. Sample 1 has one
// frame: [3 1]^T [2 0] = [6 0; 2 0], square 40; its second frame is NaN and must not be read.
static void linear(int32_t method, const char* what) {
  const float x[2][2][2] = {{{1, 2}, {3, 4}}, {{2, 0}, {NAN, NAN}}};
  const float g[2][2][2] = {{{1, 0}, {2, -1}}, {{3, 1}, {NAN, NAN}}};
  const dpk_tensor xs = {x, {2, 2, 2}, {4, 2, 1}, DPK_F32}, gs = {g, {2, 2, 2}, {4, 2, 1}, DPK_F32};
  const int64_t lengths[2] = {2, 1};
  const double exact[2] = {174.0, 40.0};
  float out[2] = {0, 0};
  int ok = dpk_cpu_linear_norm_sq(&xs, &gs, lengths, method, 2, out) == DPK_OK;
  for (int i = 0; i < 2; ++i) ok = ok && out[i] >= exact[i] && out[i] <= exact[i] * (1 + 1e-4);
  printf("        squared norms %.9g (174), %.9g (40)\n", out[0], out[1]);
  check(ok, what);
}

// The ends of Box-Muller: the largest radius, sqrt(128 ln 2), and the radius 0.
static void box_muller(void) {
  const uint64_t words[4] = {0, 0, UINT64_MAX, 12345};
  double out[4] = {0, 1, 1, 1};
  int ok = dpk_cpu_box_muller(words, 2, out) == DPK_OK;
  ok = ok && fabs(out[0] - 9.4192808) < 1e-6 && out[1] == 0 && out[2] == 0 && out[3] == 0;
  check(ok, "Box-Muller at both ends of its words");
}

// A sum of 4 over a batch of 2 moves a parameter of 1 by 0.5 * 2 to 0; with noise it goes elsewhere. The sums
// are cleared.
static void fused_step(void) {
  const uint8_t key[32] = {7};
  float parameter[3] = {1, 1, 1}, gradient[3] = {0, 0, 0};
  double sum[3] = {4, 4, 4};
  dpk_optim_tensor tensor = {parameter, sum, NULL, NULL, gradient, 3, 1, DPK_F32, {1}, {2}};
  dpk_noise noise = {key, 0.0, 0.0, 2.0, 0, 0};
  const dpk_sgd sgd = {0.5, 0.0, 0.0, 0.0, 0};
  int ok = dpk_cpu_noise_sgd(&tensor, 1, &noise, &sgd, 2) == DPK_OK;
  for (int i = 0; i < 3; ++i) ok = ok && parameter[i] == 0 && gradient[i] == 2 && sum[i] == 0;
  check(ok, "SGD without noise, the sums cleared");
  noise.noise_scale = 1.0;
  noise.grid = 0.25;
  ok = dpk_cpu_noise_sgd(&tensor, 1, &noise, &sgd, 1) == DPK_OK;
  for (int i = 0; i < 3; ++i) ok = ok && gradient[i] * 8 == rintf(gradient[i] * 8) && fabsf(gradient[i]) < 5;
  check(ok && gradient[0] != gradient[1], "SGD with noise, on its grid");
  noise.grid = 0.3;
  check(dpk_cpu_noise_sgd(&tensor, 1, &noise, &sgd, 1) == DPK_INVALID_ARGUMENT, "a grid of 0.3 is refused");
}

// Two layers in one call, a linear one of two samples (factors 2 and 0.5) and its bias; then their division.
static void grouped(void) {
  const float x[2][1][2] = {{{1, 2}}, {{4, 6}}}, g[2][1][1] = {{{3}}, {{2}}};
  const dpk_tensor xs = {x, {2, 1, 2}, {2, 2, 1}, DPK_F32}, gs = {g, {2, 1, 1}, {1, 1, 1}, DPK_F32};
  const double factors[2] = {2.0, 0.5};
  const uint8_t key[32] = {1};
  double weight[2] = {0, 0}, bias[1] = {1};
  dpk_layer layers[2];
  memset(layers, 0, sizeof(layers));
  layers[0].kind = DPK_LAYER_LINEAR;
  layers[1].kind = DPK_LAYER_BIAS;
  layers[0].out_dtype = layers[1].out_dtype = DPK_F64;
  layers[0].x = xs;
  layers[0].g = layers[1].g = gs;
  layers[0].out = weight;
  layers[1].out = bias;
  int ok = dpk_cpu_weighted_sums(layers, 2, factors, 2) == DPK_OK;
  check(ok && weight[0] == 10 && weight[1] == 18 && bias[0] == 8, "the sums of two layers in one call");
  const dpk_noised_sum sums[2] = {{weight, 2, {1}}, {bias, 1, {2}}};
  const dpk_noise noise = {key, 0.0, 0.0, 2.0, 0, 0};
  ok = dpk_cpu_noise_sums(sums, 2, &noise, 1) == DPK_OK;
  check(ok && weight[0] == 5 && weight[1] == 9 && bias[0] == 4, "and their division, without noise");
  layers[1].kind = 77;
  check(dpk_cpu_weighted_sums(layers, 2, factors, 1) == DPK_INVALID_ARGUMENT, "an unknown kind is refused");
}

static void errors(void) {
  const uint8_t zero[32] = {0};
  uint8_t out[64];
  check(dpk_cpu_chacha20_keystream(zero, -1, zero, 1, 1, out) == DPK_INVALID_ARGUMENT,
        "a negative counter is refused");
  printf("        message: %s\n", dpk_last_error());
  check(strstr(dpk_last_error(), "counter") != NULL && strstr(dpk_last_error(), "-1") != NULL,
        "the message names the argument and its value");
  check(dpk_set_isa("no such set") == DPK_INVALID_ARGUMENT, "an unknown instruction set is refused");
}

int main(void) {
  static const char* const sets[] = {"baseline", "avx2", "avx512"};
  printf("dpkernels %s, ABI %d, instruction set %s\n", dpk_version(), (int)dpk_abi_version(), dpk_isa());
  check(dpk_abi_version() == DPK_ABI_VERSION, "the ABI version is the header's");
  check(strcmp(dpk_last_error(), "") == 0, "no error before the first failure");
  for (int i = 0; i < 3; ++i) {
    if (dpk_set_isa(sets[i]) != DPK_OK) continue;
    printf("instruction set %s\n", dpk_isa());
    check(strcmp(dpk_isa(), sets[i]) == 0, "the instruction set is the one asked for");
    chacha20();
    box_muller();
    fused_step();
    grouped();
    linear(DPK_AUTO, "linear norms, chosen method");
    linear(DPK_GRAM, "linear norms, half-Gram");
    linear(DPK_DIRECT, "linear norms, direct");
  }
  check(dpk_set_isa(NULL) == DPK_OK, "back to the best instruction set");
  errors();
  printf("%d failed\n", failures);
  return failures != 0;
}
