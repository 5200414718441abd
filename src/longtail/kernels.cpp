// Batch norm, residual and ReLU in one, forward and backward, over channels-last activations (longtail.kernels).
//
// An activation is rows x channels, rows = batch * height * width, float32 or bfloat16. Memory is read twice forward
// (moments, then values) and twice backward, instead of once an operation. Sums are float32 within a block of rows and
// double across blocks; blocks are the same for any number of threads, and so are the results.

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;             // channels handled together: a register of floats
constexpr int64_t BLOCK_BYTES = 1 << 15;  // of an operand: a block of all of them stays in the cache
constexpr int64_t FEW_VALUES = 1 << 14;   // not worth a second thread

using bfloat16 = uint16_t;

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float& to, float x) { to = x; }

inline void store(bfloat16& to, float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to = bfloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The constants of LANES channels from `first` on; zeros where there are no more channels.
struct Lanes {
  float at[LANES] = {};
  Lanes(const float* values, int64_t first, int64_t channels) {
    std::copy(values + first, values + std::min(first + LANES, channels), at);
  }
};

// work(row begin, row end, block) over all rows, in blocks of `step`.
template <class Work>
void in_blocks(int64_t rows, int64_t channels, int64_t step, Work work) {
  int64_t blocks = (rows + step - 1) / step;
#pragma omp parallel for schedule(static) if (rows * channels > FEW_VALUES)
  for (int64_t block = 0; block < blocks; ++block) work(block * step, std::min(rows, (block + 1) * step), block);
}

template <class T>
int64_t block_rows(int64_t channels) {
  return std::max<int64_t>(8, BLOCK_BYTES / int64_t(sizeof(T)) / channels);
}

// Two sums a channel over all rows. at(first) gives for the channels from `first` on a function
// (row, lane, sum, other sum) that adds what its row contributes.
template <class T, class At>
void sums(int64_t rows, int64_t channels, std::vector<double>& sum, std::vector<double>& other, At at) {
  int64_t step = block_rows<T>(channels), blocks = (rows + step - 1) / step;
  std::vector<float> partial(size_t(2 * blocks * channels));
  in_blocks(rows, channels, step, [&](int64_t begin, int64_t end, int64_t block) {
    for (int64_t first = 0; first < channels; first += LANES) {
      auto add = at(first);
      int64_t width = std::min(LANES, channels - first);
      float a[2][LANES] = {}, b[2][LANES] = {};  // even and odd rows apart: two chains of additions are faster
      if (width == LANES) {
        int64_t row = begin;
        for (; row + 2 <= end; row += 2) {
#pragma omp simd
          for (int64_t lane = 0; lane < LANES; ++lane) add(row, lane, a[0][lane], b[0][lane]);
#pragma omp simd
          for (int64_t lane = 0; lane < LANES; ++lane) add(row + 1, lane, a[1][lane], b[1][lane]);
        }
        for (int64_t lane = 0; row < end && lane < LANES; ++lane) add(row, lane, a[0][lane], b[0][lane]);
      } else {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t lane = 0; lane < width; ++lane) add(row, lane, a[0][lane], b[0][lane]);
      }
      for (int64_t lane = 0; lane < width; ++lane) {
        partial[2 * block * channels + first + lane] = a[0][lane] + a[1][lane];
        partial[(2 * block + 1) * channels + first + lane] = b[0][lane] + b[1][lane];
      }
    }
  });
  sum.assign(channels, 0.0);
  other.assign(channels, 0.0);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += partial[2 * block * channels + c];
      other[c] += partial[(2 * block + 1) * channels + c];
    }
}

// at(first) gives for the channels from `first` on a function (row, lane), called for each value.
template <class T, class At>
void each(int64_t rows, int64_t channels, At at) {
  in_blocks(rows, channels, block_rows<T>(channels), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t first = 0; first < channels; first += LANES) {
      auto write = at(first);
      int64_t width = std::min(LANES, channels - first);
      for (int64_t row = begin; row < end; ++row) {
        if (width == LANES) {
#pragma omp simd
          for (int64_t lane = 0; lane < LANES; ++lane) write(row, lane);
        } else {
          for (int64_t lane = 0; lane < width; ++lane) write(row, lane);
        }
      }
    }
  });
}

// What the backward pass needs of the forward pass: four values a channel.
struct Saved {
  float *mean, *inverse_std, *scale, *shift;
  Saved(float* values, int64_t channels)
      : mean(values), inverse_std(values + channels), scale(values + 2 * channels), shift(values + 3 * channels) {}
};

template <class T>
void moments(const T* x, int64_t rows, int64_t channels, float* mean, std::vector<double>& variance) {
  std::vector<float> origin(channels);  // the first row: squares of what is left do not cancel
  for (int64_t c = 0; c < channels; ++c) origin[c] = load(x[c]);
  std::vector<double> sum, squares;
  sums<T>(rows, channels, sum, squares, [&](int64_t first) {
    return [=, from = Lanes(origin.data(), first, channels)](int64_t row, int64_t lane, float& a, float& b) {
      float value = load(x[row * channels + first + lane]) - from.at[lane];
      a += value;
      b += value * value;
    };
  });
  variance.resize(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double shifted = sum[c] / rows;
    mean[c] = float(shifted + origin[c]);
    variance[c] = std::max(0.0, squares[c] / rows - shifted * shifted);
  }
}

template <class T, bool RESIDUAL>
void values(const T* x, const T* residual, int64_t rows, int64_t channels, Saved saved, T* out) {
  each<T>(rows, channels, [&](int64_t first) {
    return [=, scale = Lanes(saved.scale, first, channels), shift = Lanes(saved.shift, first, channels)](
               int64_t row, int64_t lane) {
      int64_t i = row * channels + first + lane;
      float value = load(x[i]) * scale.at[lane] + shift.at[lane];
      if (RESIDUAL) value += load(residual[i]);
      store(out[i], value < 0 ? 0.f : value);  // NaN stays
    };
  });
}

template <class T>
void forward(const T* x, const T* residual, int64_t rows, int64_t channels, const float* weight, const float* bias,
             float eps, float momentum, float* running_mean, float* running_var, float* saved_values, T* out) {
  Saved saved(saved_values, channels);
  std::vector<double> variance;
  moments(x, rows, channels, saved.mean, variance);
  for (int64_t c = 0; c < channels; ++c) {
    saved.inverse_std[c] = float(1 / std::sqrt(variance[c] + eps));
    saved.scale[c] = weight[c] * saved.inverse_std[c];
    saved.shift[c] = bias[c] - saved.mean[c] * saved.scale[c];
    running_mean[c] += momentum * (saved.mean[c] - running_mean[c]);
    running_var[c] += momentum * (float(variance[c] * rows / (rows - 1)) - running_var[c]);
  }
  if (residual) values<T, true>(x, residual, rows, channels, saved, out);
  else values<T, false>(x, residual, rows, channels, saved, out);
}

// The gradient before the ReLU. It comes in one or two parts (through the next convolution and past it), and the ReLU
// let a value through where `out` is above 0; without a residual that is seen from x, which is read anyway.
template <class T, bool TWO, bool RESIDUAL>
struct Upstream {
  const T *x, *out, *first_part, *second_part;
  Lanes scale, shift;
  inline float operator()(int64_t i, int64_t lane) const {
    float gradient = load(first_part[i]);
    if (TWO) gradient += load(second_part[i]);
    float passed = RESIDUAL ? load(out[i]) : load(x[i]) * scale.at[lane] + shift.at[lane];
    return passed > 0 ? gradient : 0.f;
  }
};

template <class T, bool TWO, bool RESIDUAL>
void backward(const T* first_part, const T* second_part, const T* x, const T* out, int64_t rows, int64_t channels,
              float* saved_values, T* grad_x, T* grad_residual, float* grad_weight, float* grad_bias) {
  Saved saved(saved_values, channels);
  auto upstream = [=](int64_t first) {
    return Upstream<T, TWO, RESIDUAL>{x, out, first_part, second_part, Lanes(saved.scale, first, channels),
                                      Lanes(saved.shift, first, channels)};
  };
  std::vector<double> total, with_x;
  sums<T>(rows, channels, total, with_x, [&](int64_t first) {
    return [=, g = upstream(first), mean = Lanes(saved.mean, first, channels)](int64_t row, int64_t lane, float& a,
                                                                              float& b) {
      int64_t i = row * channels + first + lane;
      float gradient = g(i, lane);
      if (RESIDUAL) store(grad_residual[i], gradient);
      a += gradient;
      b += gradient * (load(x[i]) - mean.at[lane]);
    };
  });
  // d loss / d x = scale * (g - mean(g) - x_hat * mean(g * x_hat)), as gradient * scale + x * slope + offset
  std::vector<float> slope(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias[c] = float(total[c]);
    grad_weight[c] = float(with_x[c] * saved.inverse_std[c]);
    slope[c] = -saved.scale[c] * saved.inverse_std[c] * grad_weight[c] / rows;
    offset[c] = -saved.scale[c] * grad_bias[c] / rows - slope[c] * saved.mean[c];
  }
  each<T>(rows, channels, [&](int64_t first) {
    return [=, g = upstream(first), scale = Lanes(saved.scale, first, channels),
            slope_ = Lanes(slope.data(), first, channels),
            offset_ = Lanes(offset.data(), first, channels)](int64_t row, int64_t lane) {
      int64_t i = row * channels + first + lane;
      float gradient = RESIDUAL ? load(grad_residual[i]) : g(i, lane);
      store(grad_x[i], gradient * scale.at[lane] + load(x[i]) * slope_.at[lane] + offset_.at[lane]);
    };
  });
}

template <class T, class... Rest>
void choose_backward(const T* first_part, const T* second_part, const T* x, const T* out, Rest... rest) {
  if (second_part && out) backward<T, true, true>(first_part, second_part, x, out, rest...);
  else if (second_part) backward<T, true, false>(first_part, second_part, x, out, rest...);
  else if (out) backward<T, false, true>(first_part, second_part, x, out, rest...);
  else backward<T, false, false>(first_part, second_part, x, out, rest...);
}

// Adds the gradient of the shortcut of option A (longtail.fused.shortcut) to that of x.
template <class T>
void add_shortcut(const T* gradient, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t stride,
                  int64_t new_channels, T* grad_x) {
  int64_t lines = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < images * lines; ++line)
    for (int64_t column = 0; column < columns; ++column) {
      T* to = grad_x + ((line / lines * height + line % lines * stride) * width + column * stride) * channels;
      const T* from = gradient + (line * columns + column) * (channels + new_channels) + new_channels / 2;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(to[c], load(to[c]) + load(from[c]));
    }
}

#ifdef __AVX512BF16__

// The weight gradient of a 3x3 convolution with stride 1 and padding 1: for each tap, a sum over pixels of
// x[pixel + tap, in] * gradient[pixel, out]. The processor multiplies two pairs of bfloat16 and adds both products to a
// float, so pixels are taken two by two: LANES output channels are a register, an input channel's pair is broadcast.

constexpr int64_t MANY_PAIRS = 128;  // at a time: sums are seldom loaded, pairs stay in the cache
constexpr int64_t GROUPS = 16;       // of images, each with its own sums: the result does not depend on the threads

struct alignas(64) Pairs {  // two neighbouring pixels of LANES channels, the left one in the low halves
  uint32_t at[LANES];
};

inline __m512i pixel(const bfloat16* channels) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)channels));
}

inline void store(Pairs& to, __m512i left, __m512i right) {
  _mm512_store_si512(&to, _mm512_or_si512(left, _mm512_slli_epi32(right, 16)));
}

// A line of pixels as pairs (0, 1), (2, 3), ... and as pairs (-1, 0), (1, 2), ..., one more; zeros outside.
inline void pair_up(const bfloat16* line, int64_t pairs, int64_t channels, Pairs* even, Pairs* odd) {
  __m512i before = _mm512_setzero_si512();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i left = pixel(line + 2 * pair * channels), right = pixel(line + (2 * pair + 1) * channels);
    store(even[pair], left, right);
    if (odd) store(odd[pair], before, left);
    before = right;
  }
  if (odd) store(odd[pairs], before, _mm512_setzero_si512());
}

// Lines of pairs of some images, for LANES channels.
struct Lines {
  const Pairs* first;
  int64_t line, image;  // from one to the next
};

// sums[in][out lane] += over all images, `rows` lines of each and `pairs` pairs of a line.
inline void add_tap(Lines x, Lines gradient, int64_t images, int64_t rows, int64_t pairs, float* sums, int64_t out) {
  __m512 total[LANES];
#pragma GCC unroll 16
  for (int64_t in = 0; in < LANES; ++in) total[in] = _mm512_loadu_ps(sums + in * out);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t row = 0; row < rows; ++row) {
      const Pairs* x_line = x.first + image * x.image + row * x.line;
      const Pairs* gradient_line = gradient.first + image * gradient.image + row * gradient.line;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh g = (__m512bh)_mm512_load_si512(&gradient_line[pair]);
#pragma GCC unroll 16
        for (int64_t in = 0; in < LANES; ++in)
          total[in] = _mm512_dpbf16_ps(total[in], g, (__m512bh)_mm512_set1_epi32(int(x_line[pair].at[in])));
      }
    }
#pragma GCC unroll 16
  for (int64_t in = 0; in < LANES; ++in) _mm512_storeu_ps(sums + in * out, total[in]);
}

// width even, in and out multiples of LANES
void weight_gradient(const bfloat16* x, const bfloat16* gradient, int64_t images, int64_t height, int64_t width,
                     int64_t in, int64_t out, float* result) {
  int64_t pairs = width / 2, taps = 9 * in * out, groups = std::min(images, GROUPS);
  int64_t strip = std::min(height, std::max<int64_t>(1, MANY_PAIRS / pairs));        // rows and images
  int64_t stack = std::max<int64_t>(1, MANY_PAIRS / (pairs * strip));                // at a time
  int64_t even = (strip + 2) * pairs, odd = (strip + 2) * (pairs + 1), grad = strip * pairs;  // of an image
  std::vector<float> sums(size_t(groups * taps));
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<Pairs> evens(stack * even * in / LANES), odds(stack * odd * in / LANES), grads(stack * grad * out / LANES);
    int64_t end = (group + 1) * images / groups;
    for (int64_t first = group * images / groups; first < end; first += stack)
      for (int64_t top = 0; top < height; top += strip) {
        int64_t rows = std::min(strip, height - top), here = std::min(stack, end - first);
        for (int64_t image = 0; image < here; ++image) {
          int64_t corner = ((first + image) * height + top) * width;
          for (int64_t i = 0; i < in / LANES; ++i)
            for (int64_t row = 0; row < rows + 2; ++row) {  // from the one above the strip to the one below
              Pairs* to_even = &evens[(i * stack + image) * even + row * pairs];
              Pairs* to_odd = &odds[(i * stack + image) * odd + row * (pairs + 1)];
              if (top + row < 1 || top + row > height) {
                std::memset(to_even, 0, pairs * sizeof(Pairs));
                std::memset(to_odd, 0, (pairs + 1) * sizeof(Pairs));
              } else {
                pair_up(x + (corner + (row - 1) * width) * in + i * LANES, pairs, in, to_even, to_odd);
              }
            }
          for (int64_t o = 0; o < out / LANES; ++o)
            pair_up(gradient + corner * out + o * LANES, rows * pairs, out, &grads[(o * stack + image) * grad], nullptr);
        }
        // what comes next lies behind, and would come from memory: fetched bit by bit while this is worked on
        const char* next_x = (const char*)(x + ((first + here - 1) * height + top + rows) * width * in);
        const char* next_gradient = (const char*)(gradient + ((first + here - 1) * height + top + rows) * width * out);
        int64_t tiles = taps / (LANES * LANES), x_share = 2 * here * rows * width * in / tiles + 1;
        int64_t gradient_share = 2 * here * rows * width * out / tiles + 1;
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t i = 0; i < in / LANES; ++i)
            for (int64_t o = 0; o < out / LANES; ++o) {
              for (int64_t byte = 0; byte < x_share; byte += 64) __builtin_prefetch(next_x + byte, 0, 2);
              for (int64_t byte = 0; byte < gradient_share; byte += 64) __builtin_prefetch(next_gradient + byte, 0, 2);
              next_x += x_share, next_gradient += gradient_share;
              int64_t row = tap / 3, column = tap % 3;
              Lines shifted{&odds[i * stack * odd + row * (pairs + 1) + (column == 2)], pairs + 1, odd};
              if (column == 1) shifted = {&evens[i * stack * even + row * pairs], pairs, even};
              add_tap(shifted, {&grads[o * stack * grad], pairs, grad}, here, rows, pairs,
                      &sums[group * taps + (tap * in + i * LANES) * out + o * LANES], out);
            }
      }
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < 9 * in; ++row) {  // to out channel, tap, in channel: a weight's channels-last layout
    float* total = &sums[row * out];
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t o = 0; o < out; ++o) total[o] += sums[group * taps + row * out + o];
    for (int64_t o = 0; o < out; ++o) result[o * 9 * in + row] = total[o];
  }
}

#endif

}  // namespace

#ifdef __AVX512BF16__
extern "C" void weight_gradient_bfloat16(const bfloat16* x, const bfloat16* gradient, int64_t images, int64_t height,
                                         int64_t width, int64_t in, int64_t out, float* result) {
  weight_gradient(x, gradient, images, height, width, in, out, result);
}
#endif

#define EXPORT(T)                                                                                                    \
  extern "C" void forward_##T(const T* x, const T* residual, int64_t rows, int64_t channels, const float* weight,    \
                              const float* bias, float eps, float momentum, float* running_mean, float* running_var, \
                              float* saved, T* out) {                                                                \
    forward<T>(x, residual, rows, channels, weight, bias, eps, momentum, running_mean, running_var, saved, out);     \
  }                                                                                                                  \
  extern "C" void backward_##T(const T* first_part, const T* second_part, const T* x, const T* out, int64_t rows,    \
                               int64_t channels, float* saved, T* grad_x, T* grad_residual, float* grad_weight,      \
                               float* grad_bias) {                                                                   \
    choose_backward<T>(first_part, second_part, x, out, rows, channels, saved, grad_x, grad_residual, grad_weight,   \
                       grad_bias);                                                                                   \
  }                                                                                                                  \
  extern "C" void add_shortcut_##T(const T* gradient, int64_t images, int64_t height, int64_t width,                 \
                                   int64_t channels, int64_t stride, int64_t new_channels, T* grad_x) {              \
    add_shortcut<T>(gradient, images, height, width, channels, stride, new_channels, grad_x);                        \
  }

typedef float float32;
EXPORT(float32)
EXPORT(bfloat16)
