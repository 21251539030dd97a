// The contract between the engine and the instruction sets: one table of function pointers per ISA.
//
// Each csrc/isa/*.cc starts from the table of the ISA below it and overwrites what it does better. These files are the
// only ones compiled with -m flags, and they include nothing with inline std code: an inline function compiled with
// AVX-512 could be the copy that the linker keeps for everybody.
//
// Activations are u8, NHWC. `a` is the input, `w` the packed weights, `c` the output; strides are in bytes for u8 data
// and in elements for other outputs and residuals. Every kernel may read up to kOverread bytes before and after the
// elements it needs (every buffer has that slack), and what lies between the activations of a call; what it read there
// never reaches an output. It writes exactly what it is asked to.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qdeploy {

constexpr size_t kOverread = 64;

enum class Dtype : int32_t { u8, s16, s8, f32, i32 };  // i32: token ids, which no kernel reads

// ---- Convolution and linear -----------------------------------------------------------------------------------------
//
// One panel (nr output channels) times a list of tiles. A tile is `strips` strips of r pixels; the pixels of a strip
// lie at a constant stride, the strips anywhere. acc[p][n] = comp[n] + sum over cells t, bytes i < k of
//     (a[tile.a[s] + p*a_stride + cell_offset[t] + i] - a_offset) * w[t][i][n]
// then r = fma(float(acc), multiplier[n], bias[n]), with a residual r = fma(float(residual), residual_multiplier, r).
// To inner codes the residual is added as `add` does it. c = clamp(rint(r), qmin, qmax) as u8, clamp(rint(r), -32767, 32767) as s16, or r itself as f32; with codes of 16 bits
// |r| is below 2^30. comp = (a_offset - zero_point) * sum of the channel's codes, so that the kernel's own a_offset (0,
// or 128 where it needs signed activations) never shows in acc.
//
// Packed panel, WeightFormat::s8x4:  int8  w[cells][k/4][nr][4]   element (t, i, n) at ((t*(k/4) + i/4)*nr + n)*4 + i%4
//               WeightFormat::s16x2: int16 w[cells][k/2][nr][2]   likewise with 2
// A cell of the window is one of its pixels, or a whole row where that lies in one piece. k is a multiple of 4: a cell
// consists of quads, four neighbouring bytes each. Bytes beyond the real channels meet zero weights. comp, multiplier
// and bias hold nr entries, zeros beyond the real channels.
enum class WeightFormat : int32_t { s8x4, s16x2 };

// What a residual is added to where that is not r itself but its codes t = clamp(rint(r), qmin, qmax):
//     t = min(max(r + kRound, low), high) - kRound
//     r = fma(t, multiplier, fma(float(residual), residual_multiplier, bias))
// A sum with kRound has no bits for a fraction where |r| <= 2^22, and beyond that is clamped. As integers the floats of
// this maximum and minimum have the same order, but for the negative ones, all of them below `low`.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
struct InnerCodes {
  float low, high;  // kRound + qmin, kRound + qmax
  float multiplier, bias;
};

struct ConvTile {
  uint32_t a[2];         // first pixel of each strip, cell offset not included
  uint32_t c[2];         // first pixel of each strip in the output, in output elements
  uint32_t residual[2];  // likewise in the residual
  uint8_t r;             // pixels of a strip, 1..mr
  uint8_t strips;        // 1..ConvKernel::strips
};

struct ConvParams {
  int32_t cells;  // >= 1
  int32_t k;      // bytes per cell, a multiple of 4, >= 4
  int32_t n;      // channels of this panel to write, 1..nr
  const uint8_t* a;
  ptrdiff_t a_stride;
  const int32_t* cell_offset;
  const void* w;  // 64-byte aligned
  const int32_t* comp;
  const float* multiplier;
  const float* bias;
  void* c;  // first channel of this panel: uint8_t, int16_t or float
  ptrdiff_t c_stride;
  const void* residual;  // null: none. May be the very memory of c (same offsets and stride)
  Dtype residual_type;   // u8 or s16
  ptrdiff_t residual_stride;
  float residual_multiplier;
  const InnerCodes* inner;  // null: none. Only with a residual
  uint8_t qmin, qmax;
  const void* prefetch;  // the panel that will be needed next; a hint, any address
  size_t prefetch_bytes;
  const int32_t* lanes;  // grouped kernels: [k/4][nr], see below
};

using ConvFn = void (*)(const ConvParams* params, const ConvTile* tiles, size_t n_tiles);

struct ConvKernel {
  const char* name;  // qu8_qc8w_conv_{pixels}x{NR}c{KR}__{isa}, with _w{bits} where narrower weights are a precondition
  ConvFn qu8;        // u8 output
  ConvFn s16;        // s16 output
  ConvFn f32;        // f32 output
  int32_t mr;        // most pixels in a strip
  int32_t strips;    // most strips in a tile, 1 or 2
  int32_t nr;        // channels in a panel, at most kMaxNr
  WeightFormat format;
  // 0: exact for the codes of Kernels::conv. Else the kernel adds in 16 bits the products of that many consecutive
  // quads, counted from the start of a cell, and apart for bytes 0, 1 and bytes 2, 3 of a quad. It is exact for any
  // codes of which the positive ones add up to at most 128 there, and the negative ones too: 255 * 128 < 2^15.
  int32_t s16_quads = 0;
  int32_t a_offset = 0;    // what the kernel subtracts from activations, see above
  int32_t k_multiple = 4;  // at most kOverread: k is a multiple of it where more than a quarter of it
};
constexpr int32_t kMaxNr = 64;

// Convolutions of few channels a group (ResNeXt has 4 to 32), where a dense panel would be mostly zeros. k is now the
// channels of one group, 4..16; each lane picks its own four bytes of a window of kGroupedWindow bytes:
//     acc[p][n] = comp[n] + sum over cells t, quads q < k/4, bytes i < 4 of
//         a[tile.a[s] + p*a_stride + cell_offset[t] + 4*lanes[q*nr + n] + i] * w[t][4*q + i][n]
// with lanes below kGroupedWindow/4, w packed as s8x4, and everything else as above, but for inner codes: none.
constexpr int32_t kGroupedWindow = 32;

// ---- Winograd convolution -------------------------------------------------------------------------------------------
//
// A dense 3x3 convolution of stride 1 by fewer products, in integers and without rounding (docs/kernels.md): F(m x m,
// 3x3), m = 4 or 2. A patch is m x m output pixels and the (m+2) x (m+2) input pixels that they follow from, at each of
// whose positions there is a product of its own. Three kernels, for a block of patches:
//
//     input       V[position][patch][channel] = BT (q - zero_point) B of a patch, s16
//     products    M[position][patch][n] = sum over channels of V * U, s32, modulo 2^32
//     output      acc = (AT M A * inverse modulo 2^32) >> shift of a patch, then requantization as of a convolution
//
//     F(4x4)  BT =  2  3 -4 -3  2  0    G = 15  0  0    AT = 1  1  1  1 -8  0    AT M A = 900 * acc
//                   0  2  5  1 -2  0         5  5  5         0  1 -1  2  4  0    inverse 2271560481 = 1/225 mod 2^32
//                   0  2  1 -5  2  0         5 -5  5         0  1  1  4 -2  0    shift 2
//                   0 -1 -2  1  2  0         1  2  4         0  1 -1  8  1  1
//                   0  2 -1 -2  1  0         4 -2  1
//                   0  2  3 -4 -3  2         0  0 15
//
//     F(2x2)  BT =  1  0 -1  0          G =  2  0  0    AT = 1  1  1  0          AT M A = 4 * acc
//                   0  1  1  0               1  1  1         0  1 -1  1          inverse 1
//                   0 -1  1  0               1 -1  1                             shift 2
//                   0 -1  0  1               0  0  2
//
// Both are right for |acc| < 2^29. U = G w GT, s16: at most 225 * 128, and V at most 100 * 255. Whatever the pixels of a
// patch are, those outputs are right that follow from the right ones. Channels lie in chunks:
//     int16  V[position][chunk][patch][kWinogradChunk]
//     int16  U[position][k/pair][nr][pair]                one panel; 0 for channels that there are not
//     int32  M[position][patch][nr]
constexpr int32_t kWinogradChunk = 32;

struct WinogradInput {  // one patch
  const uint8_t* a;     // its first input pixel, channel 0
  ptrdiff_t row_stride, a_stride;
  int32_t n;  // channels; what a chunk holds beyond is anything, before and after
  uint8_t zero_point;
  int16_t* v;                               // of position 0, chunk 0, this patch; 64-byte aligned
  ptrdiff_t position_stride, chunk_stride;  // elements
};
using WinogradInputFn = void (*)(const WinogradInput* params);

struct WinogradProducts {  // one panel
  int32_t positions, patches;
  int32_t k;         // channels rounded up to a multiple of 8
  const int16_t* v;  // of position 0, the first chunk of this panel, patch 0; 64-byte aligned
  ptrdiff_t v_position_stride, v_chunk_stride;
  const int16_t* u;  // 64-byte aligned
  int32_t* m;        // 64-byte aligned
  ptrdiff_t m_position_stride;
};
using WinogradProductsFn = void (*)(const WinogradProducts* params);

struct WinogradOutput {  // one patch under one panel
  const int32_t* m;      // of position 0; 64-byte aligned
  ptrdiff_t position_stride;
  int32_t rows, columns;  // of the patch that lie in the output, 1..m
  int32_t n;              // channels of this panel to write, 1..nr
  const float* multiplier;
  const float* bias;
  void* c;  // first pixel and channel
  ptrdiff_t c_row_stride, c_stride;
  const uint8_t* residual;  // null: none. May be the very memory of c
  ptrdiff_t residual_row_stride, residual_stride;
  float residual_multiplier;
  const InnerCodes* inner;  // as in ConvParams
  uint8_t qmin, qmax;
};
using WinogradOutputFn = void (*)(const WinogradOutput* params);

struct WinogradKernel {
  const char* name;  // qu8_qc8w_winograd_{m}x{m}_{patches}x{NR}__{isa}
  WinogradInputFn input;
  WinogradProductsFn products;
  WinogradOutputFn qu8, f32;
  int32_t m;
  int32_t mr;    // patches that the products take at once
  int32_t nr;    // channels in a panel
  int32_t pair;  // neighbouring channels of U, 1 or 2
  int32_t rate;  // products a cycle, about: by it the form is chosen. 0: only where it is asked for
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------
//
// `rows` rows of `pixels` neighbouring output pixels, all channels: acc[p][n] = comp[n] + sum over cells t of
//     a[p*a_stride + cell_offset[t] + n] * w[t*w_stride + n]
// requantized as above. w is int8; w, comp, multiplier and bias are readable up to the next multiple of kMaxNr of n.
struct DepthwiseParams {
  int32_t cells;  // a window, row by row
  int32_t columns;
  int32_t n;
  const uint8_t* a;
  ptrdiff_t a_row_stride, a_stride;  // from one output row or pixel to the next
  const int32_t* cell_offset;        // of the cells of a row each column_stride > 0 after the one before it
  ptrdiff_t column_stride;
  const int8_t* w;
  ptrdiff_t w_stride;
  // Whether for each channel the positive codes of two rows of the window, counted in pairs from the first, add up to
  // at most 128, and the negative ones too: 255 * 128 < 2^15.
  bool fits_s16;
  const int32_t* comp;
  const float* multiplier;
  const float* bias;
  uint8_t* c;
  ptrdiff_t c_row_stride, c_stride;
  uint8_t qmin, qmax;
};
using DepthwiseFn = void (*)(const DepthwiseParams* params, size_t rows, size_t pixels);

// r itself, to c[p*c_stride + n] for `pixels` neighbours; DepthwiseParams::c is not looked at.
using DepthwiseF32Fn = void (*)(const DepthwiseParams* params, size_t pixels, float* c);

// ---- Pools, elementwise, input --------------------------------------------------------------------------------------
//
// A pool sees the part of each window that lies inside the image: rows x cols pixels of n channels. It writes `pixels`
// neighbouring output pixels, whose windows lie a_stride apart.
struct PoolParams {
  const uint8_t* a;
  size_t rows, cols;
  ptrdiff_t row_stride, col_stride;  // dilation included
  size_t n;
  size_t pixels;
  ptrdiff_t a_stride, c_stride;
};
using MaxPoolFn = void (*)(const PoolParams* params, uint8_t* c);

// acc = sum - zero_point*rows*cols; r = fma(float(acc), multiplier, bias)
struct AvgPoolParams {
  PoolParams window;
  int32_t zero_point;
  float multiplier, bias;
  uint8_t qmin, qmax;
};
using AvgPoolQu8Fn = void (*)(const AvgPoolParams* params, uint8_t* c);
using AvgPoolF32Fn = void (*)(const AvgPoolParams* params, float* c);

// r = fma(float(a), multiplier_a, fma(float(b), multiplier_b, bias)). c may be a or b.
struct AddParams {
  float multiplier_a, multiplier_b, bias;
  uint8_t qmin, qmax;
};
using AddQu8Fn = void (*)(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, uint8_t* c);
using AddF32Fn = void (*)(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, float* c);

// acc = (a - zero_point_a) * (b - zero_point_b); r = fma(float(acc), multiplier, bias). `pixels` times n elements,
// which follow each other in a and c; in b too, or, with b_stride 0, the same n for every pixel: a gate. c may be a.
struct MulParams {
  size_t pixels, n;
  ptrdiff_t b_stride;  // n or 0
  int32_t zero_point_a, zero_point_b;
  float multiplier, bias;
  uint8_t qmin, qmax;
};
using MulQu8Fn = void (*)(const MulParams* params, const uint8_t* a, const uint8_t* b, uint8_t* c);
using MulF32Fn = void (*)(const MulParams* params, const uint8_t* a, const uint8_t* b, float* c);

// c[i] = table[a[i]]; c may be a.
using TableFn = void (*)(size_t n, const uint8_t* table, const uint8_t* a, uint8_t* c);

// f32 planes to u8 pixels: c[p*c_stride + ch] = clamp(rint(fma(a[ch*plane_stride + p], inv_scale, zero_point)), 0, 255)
// for p < pixels, ch < channels. Returns false if any of these inputs is NaN or infinite (c is then unspecified).
struct QuantizeParams {
  const float* a;
  ptrdiff_t plane_stride;  // in floats
  size_t pixels, channels;
  float inv_scale, zero_point;
  uint8_t* c;
  ptrdiff_t c_stride;
};
using QuantizeFn = bool (*)(const QuantizeParams* params);

// ---- Rows of codes --------------------------------------------------------------------------------------------------
//
// Tokens and residual streams. A row holds n elements; codes are u8, s16 (-32767..32767) or, of weights, s8. An output
// is c = clamp(rint(r), qmin, qmax) as u8, clamp(rint(r), -32767, 32767) as s16, or r itself as f32; for codes |r| is
// below 2^30. Strides are in elements.

// r = fma(float(a), multiplier_a, x), where x is `bias`; with codes b, u8 or s16, fma(float(b), multiplier_b, bias);
// with floats b, b itself. c may be a or b where the types agree. s8 goes with floats, i32 (sums) with the bias alone.
struct ScaleAddParams {
  size_t n;
  const void* a;
  const void* b;  // null: none
  Dtype a_type, b_type, c_type;
  float multiplier_a, multiplier_b, bias;
  uint8_t qmin, qmax;
  void* c;
};
using ScaleAddFn = void (*)(const ScaleAddParams* params);

// acc = sum of a over rows x columns - offset, a of u8 or s16; r = fma(float(acc), multiplier, bias).
struct MeanParams {
  size_t rows, columns, n;
  const void* a;
  ptrdiff_t row_stride, column_stride;
  Dtype a_type, c_type;
  int32_t offset;
  float multiplier, bias;
  uint8_t qmin, qmax;
  void* c;
};
using MeanFn = void (*)(const MeanParams* params);

// c = start + sum over the taps k of weights[k] * a[k*a_stride + i], modulo 2^32; a of u8 or i32. c is written up to a
// multiple of 16 elements.
struct WeighParams {
  size_t taps, n;
  const void* a;
  ptrdiff_t a_stride;
  Dtype a_type;
  const int32_t* weights;
  int32_t start;
  int32_t* c;
};
using WeighFn = void (*)(const WeighParams* params);

// ---- Norm -----------------------------------------------------------------------------------------------------------
//
// The sums of codes and of their squares, of each row; or of each channel, added to what is there. A sum fits int32.
struct NormSumsParams {
  size_t rows, n;
  const void* a;
  ptrdiff_t a_stride;
  Dtype a_type;      // u8 or s16
  int32_t* sums;     // [rows] or [n]
  int64_t* squares;  // likewise
};
using NormSumsFn = void (*)(const NormSumsParams* params);

// t = float(count*a - sum) * scale, r = fma(t, multiplier[i], bias[i]), sum and scale being those of the row or of the
// channel. count*a - sum fits int32. c may be a where the types agree.
struct NormParams {
  size_t rows, n;
  const void* a;
  ptrdiff_t a_stride;
  Dtype a_type, c_type;
  bool by_channel;  // sums and scales: [n] instead of [rows]
  int32_t count;
  const int32_t* sums;
  const float* scales;
  const float* multiplier;
  const float* bias;
  uint8_t qmin, qmax;
  void* c;
  ptrdiff_t c_stride;
};
using NormFn = void (*)(const NormParams* params);

// ---- Attention ------------------------------------------------------------------------------------------------------
//
// One head (csrc/attention.cc). Both products are WinogradKernel::products of F(4x4): rows take the place of patches,
// panels that of positions. What they multiply is s16, codes minus their zero point:
//     q, and the weights p      int16 [chunk][row][kWinogradChunk]
//     keys                      int16 [panel][channels/pair][nr keys][pair]
//     values                    int16 [panel][keys/pair][nr channels][pair]
// with channels and keys along which sums run rounded up to a multiple of 8, zeros beyond.
struct AttentionPack {
  int32_t rows, n;  // n channels of each row
  const uint8_t* a;
  ptrdiff_t a_stride;
  uint8_t zero_point;
  int32_t nr, pair;        // of keys and values
  ptrdiff_t chunk_stride;  // of q
  int16_t* c;              // 64-byte aligned
};
using AttentionPackFn = void (*)(const AttentionPack* params);

// Of each row, over its keys j:
//     t = fma(float(logit), logit_multiplier, bias[j] or 0)       -infinity where key_regions[j] != row_regions[row]
//     d = max(t - max t, -32);   n = rint(d);   f = d - n
//     y = fma(fma(fma(fma(c4, f, c3), f, c2), f, c1), f, 1)
//     p = rint((y * peak) * 2^n)                                  kWeightBits holds c1..c4
// and the sum of p. At least one key of a row is in its region. p is written up to a multiple of 16 keys, 0 beyond.
struct AttentionWeights {
  int32_t rows, keys;
  int32_t* logits;  // [panel][row][nr]; afterwards anything; 64-byte aligned
  ptrdiff_t panel_stride;
  int32_t nr;
  float logit_multiplier;
  const float* bias;  // of the first row; null: none
  ptrdiff_t bias_stride;
  const int32_t* row_regions;  // null: all keys are seen
  const int32_t* key_regions;
  float peak;
  int16_t* p;  // 64-byte aligned
  ptrdiff_t chunk_stride;
  int32_t* sums;
};
using AttentionWeightsFn = void (*)(const AttentionWeights* params);
constexpr uint32_t kWeightBits[4] = {0x3f317096, 0x3e7601bc, 0x3d64fe23, 0x3c1d0166};  // relative error 2.8e-6

// r = fma(float(acc), scales[row], bias), to u8.
struct AttentionOutput {
  int32_t rows, n;
  const int32_t* acc;  // [panel][row][nr]; 64-byte aligned
  ptrdiff_t panel_stride;
  int32_t nr;
  const float* scales;
  float bias;
  uint8_t qmin, qmax;
  uint8_t* c;
  ptrdiff_t c_stride;
};
using AttentionOutputFn = void (*)(const AttentionOutput* params);

// ---- LSQ, for training ----------------------------------------------------------------------------------------------
//
// x = value / step, r = rint(min(max(x, qmin), qmax)), NaN staying NaN. Forward: c = r * step. Backward: c = grad where
// qmin <= x <= qmax, else 0; returns the sum of grad * (r - x there, else r), products in float32. Error: the sum of the
// squares of r * step - value, squares in float32. Eight sums in float64, of the numbers i, i + 8, ... each, are added up
// as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
struct LsqParams {
  const float* value;
  const float* grad;  // of backward
  size_t n;
  float step, qmin, qmax;
  float* c;  // may be grad; not of error
};
using LsqForwardFn = void (*)(const LsqParams* params);
using LsqBackwardFn = double (*)(const LsqParams* params);
using LsqErrorFn = double (*)(const LsqParams* params);

// ---- The table ------------------------------------------------------------------------------------------------------
struct Kernels {
  const char* isa;
  ConvKernel conv[9];  // [b]: for weights whose codes all lie in [-2^(b-1), 2^(b-1)-1], b = 2..8; [0] and [1] unused
  ConvKernel grouped;  // u8 output only; qu8 is null where an ISA has no such kernel
  WinogradKernel winograd[2];  // F(4x4) and F(2x2)
  DepthwiseFn depthwise;
  DepthwiseF32Fn depthwise_f32;
  int32_t depthwise_channels;  // that `depthwise` takes at once: at most kMaxNr
  MaxPoolFn max_pool;
  AvgPoolQu8Fn avg_pool_qu8;
  AvgPoolF32Fn avg_pool_f32;
  AddQu8Fn add_qu8;
  AddF32Fn add_f32;
  MulQu8Fn mul_qu8;
  MulF32Fn mul_f32;
  TableFn table;
  QuantizeFn quantize;
  ScaleAddFn scale_add;
  MeanFn mean;
  WeighFn weigh;
  NormSumsFn norm_row_sums, norm_channel_sums;
  NormFn norm;
  AttentionPackFn attention_q, attention_keys, attention_values;
  AttentionWeightsFn attention_weights;
  AttentionOutputFn attention_output;
  LsqForwardFn lsq_forward;
  LsqBackwardFn lsq_backward;
  LsqErrorFn lsq_error;
};

// Each fills `kernels` completely or, above scalar, overwrites entries of the table below it. Both avxvnni and avx512
// stand on avx2.
void init_scalar(Kernels* kernels);
void init_avx2(Kernels* kernels);        // AVX2 + FMA
void init_avxvnni(Kernels* kernels);     // the above + AVX_VNNI, the VEX form
void init_avx512(Kernels* kernels);      // AVX-512 F, BW, DQ, VL
void init_avx512vnni(Kernels* kernels);  // the above + AVX512_VNNI
void init_amx(Kernels* kernels);         // the above + AMX_TILE, AMX_INT8

void init_neon(Kernels* kernels);     // Advanced SIMD: every ARMv8-A
void init_neondot(Kernels* kernels);  // the above + FEAT_DotProd

}  // namespace qdeploy
