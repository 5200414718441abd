// Batch norm, residual and ReLU in one, forward and backward, over channels-last activations (longtail.networks.kernels).
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
#include <memory>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;             // channels handled together: a register of floats
constexpr int64_t BLOCK_BYTES = 1 << 15;  // of an operand: a block of all of them stays in the cache
constexpr int64_t FEW_VALUES = 1 << 14;   // not worth a second thread

using bfloat16 = uint16_t;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats widen(Floats x) { return x; }
inline Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Bits) << 16); }

inline void narrow(Floats x, Floats& to) { to = x; }
inline void narrow(Floats x, Halves& to) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  to = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Bits bits = (Bits)x;
  to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
}

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type = Floats;
};
template <>
struct Vector<bfloat16> {
  using type = Halves;
};

// LANES values, or the first `width` of them and zeros.
template <bool ALL, class T>
inline Floats load(const T* from, int64_t width) {
  typename Vector<T>::type values = {};
  std::memcpy(&values, from, ALL ? sizeof values : width * sizeof(T));
  return widen(values);
}

template <bool ALL, class T>
inline void store(T* to, Floats x, int64_t width) {
  typename Vector<T>::type values;
  narrow(x, values);
  std::memcpy(to, &values, ALL ? sizeof values : width * sizeof(T));
}

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

// Calls work(whether there are LANES channels from `first` on, first, how many) for all channels.
template <class Work>
inline void by_lanes(int64_t channels, Work work) {
  int64_t first = 0;
  for (; first + LANES <= channels; first += LANES) work(std::true_type(), first, LANES);
  if (first < channels) work(std::false_type(), first, channels - first);
}

// Two sums a channel over all rows. pass.sum<ALL>(i, lane constants, sum, other) adds what the values from i on give.
template <class T, class Pass>
void sums(int64_t rows, int64_t channels, std::vector<double>& sum, std::vector<double>& other, Pass pass) {
  int64_t step = block_rows<T>(channels), blocks = (rows + step - 1) / step;
  std::vector<float> partial(size_t(2 * blocks * channels));
  in_blocks(rows, channels, step, [&](int64_t begin, int64_t end, int64_t block) {
    by_lanes(channels, [&](auto all, int64_t first, int64_t width) {
      auto add = pass.template at<decltype(all)::value>(first, width);
      Floats a[2] = {}, b[2] = {};  // even and odd rows apart: two chains of additions are faster
      int64_t row = begin;
      for (; row + 2 <= end; row += 2) {
        add(row * channels + first, a[0], b[0]);
        add((row + 1) * channels + first, a[1], b[1]);
      }
      if (row < end) add(row * channels + first, a[0], b[0]);
      store<decltype(all)::value>(&partial[2 * block * channels + first], a[0] + a[1], width);
      store<decltype(all)::value>(&partial[(2 * block + 1) * channels + first], b[0] + b[1], width);
    });
  });
  sum.assign(channels, 0.0);
  other.assign(channels, 0.0);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += partial[2 * block * channels + c];
      other[c] += partial[(2 * block + 1) * channels + c];
    }
}

// Calls what pass.at<ALL>(first channel, width) gives for the values of each row.
template <class T, class Pass>
void each(int64_t rows, int64_t channels, Pass pass) {
  in_blocks(rows, channels, block_rows<T>(channels), [&](int64_t begin, int64_t end, int64_t) {
    by_lanes(channels, [&](auto all, int64_t first, int64_t width) {
      auto write = pass.template at<decltype(all)::value>(first, width);
      for (int64_t row = begin; row < end; ++row) write(row * channels + first);
    });
  });
}

// What the backward pass needs of the forward pass: four values a channel.
struct Saved {
  float *mean, *inverse_std, *scale, *shift;
  Saved(float* values, int64_t channels)
      : mean(values), inverse_std(values + channels), scale(values + 2 * channels), shift(values + 3 * channels) {}
};

template <class T>
struct Moments {
  const T* x;
  const float* origin;
  template <bool ALL>
  auto at(int64_t first, int64_t width) const {
    return [x = x, width, from = load<ALL>(origin + first, width)](int64_t i, Floats& sum, Floats& squares) {
      Floats value = load<ALL>(x + i, width) - from;
      sum += value;
      squares += value * value;
    };
  }
};

template <class T>
void moments(const T* x, int64_t rows, int64_t channels, float* mean, std::vector<double>& variance) {
  std::vector<float> origin(channels);  // the first row: squares of what is left do not cancel
  for (int64_t c = 0; c < channels; ++c) origin[c] = load<false>(x + c, 1)[0];
  std::vector<double> sum, squares;
  sums<T>(rows, channels, sum, squares, Moments<T>{x, origin.data()});
  variance.resize(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double shifted = sum[c] / rows;
    mean[c] = float(shifted + origin[c]);
    variance[c] = std::max(0.0, squares[c] / rows - shifted * shifted);
  }
}

template <class T, bool RESIDUAL>
struct Values {
  const T *x, *residual;
  Saved saved;
  T* out;
  template <bool ALL>
  auto at(int64_t first, int64_t width) const {
    return [=, *this, scale = load<ALL>(saved.scale + first, width),
            shift = load<ALL>(saved.shift + first, width)](int64_t i) {
      Floats value = load<ALL>(x + i, width) * scale + shift;
      if (RESIDUAL) value += load<ALL>(residual + i, width);
      store<ALL>(out + i, value < 0 ? Floats{} : value, width);  // NaN stays
    };
  }
};

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
  if (residual) each<T>(rows, channels, Values<T, true>{x, residual, saved, out});
  else each<T>(rows, channels, Values<T, false>{x, residual, saved, out});
}

// The gradient before the ReLU. It comes in one or two parts (through the next convolution and past it), and the ReLU
// let a value through where `out` is above 0; without a residual that is seen from x, which is read anyway. With a
// residual it is the residual's gradient too, and is written down on the way.
template <class T, bool TWO, bool RESIDUAL>
struct Upstream {
  const T *x, *out, *first_part, *second_part;
  Saved saved;
  T* grad_residual;
  template <bool ALL>
  auto at(int64_t first, int64_t width) const {
    return [=, *this, scale = load<ALL>(saved.scale + first, width), shift = load<ALL>(saved.shift + first, width),
            mean = load<ALL>(saved.mean + first, width)](int64_t i, Floats& total, Floats& with_x) {
      Floats gradient = load<ALL>(first_part + i, width), value = load<ALL>(x + i, width);
      if (TWO) gradient += load<ALL>(second_part + i, width);
      Floats passed = RESIDUAL ? load<ALL>(out + i, width) : value * scale + shift;
      gradient = passed > 0 ? gradient : Floats{};
      if (RESIDUAL) store<ALL>(grad_residual + i, gradient, width);
      total += gradient;
      with_x += gradient * (value - mean);
    };
  }
};

// d loss / d x = scale * (g - mean(g) - x_hat * mean(g * x_hat)), as g * scale + x * slope + offset
template <class T, bool TWO, bool RESIDUAL>
struct Downstream {
  const T *x, *first_part, *second_part, *grad_residual;
  Saved saved;
  const float *slope, *offset;
  T* grad_x;
  template <bool ALL>
  auto at(int64_t first, int64_t width) const {
    return [=, *this, scale = load<ALL>(saved.scale + first, width), shift = load<ALL>(saved.shift + first, width),
            slope_ = load<ALL>(slope + first, width), offset_ = load<ALL>(offset + first, width)](int64_t i) {
      Floats value = load<ALL>(x + i, width), gradient;
      if (RESIDUAL) {
        gradient = load<ALL>(grad_residual + i, width);
      } else {
        gradient = load<ALL>(first_part + i, width);
        if (TWO) gradient += load<ALL>(second_part + i, width);
        gradient = value * scale + shift > 0 ? gradient : Floats{};
      }
      store<ALL>(grad_x + i, gradient * scale + value * slope_ + offset_, width);
    };
  }
};

template <class T, bool TWO, bool RESIDUAL>
void backward(const T* first_part, const T* second_part, const T* x, const T* out, int64_t rows, int64_t channels,
              float* saved_values, T* grad_x, T* grad_residual, float* grad_weight, float* grad_bias) {
  Saved saved(saved_values, channels);
  std::vector<double> total, with_x;
  sums<T>(rows, channels, total, with_x,
          Upstream<T, TWO, RESIDUAL>{x, out, first_part, second_part, saved, grad_residual});
  std::vector<float> slope(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    grad_bias[c] = float(total[c]);
    grad_weight[c] = float(with_x[c] * saved.inverse_std[c]);
    slope[c] = -saved.scale[c] * saved.inverse_std[c] * grad_weight[c] / rows;
    offset[c] = -saved.scale[c] * grad_bias[c] / rows - slope[c] * saved.mean[c];
  }
  each<T>(rows, channels,
          Downstream<T, TWO, RESIDUAL>{x, first_part, second_part, grad_residual, saved, slope.data(), offset.data(),
                                       grad_x});
}

template <class T, class... Rest>
void choose_backward(const T* first_part, const T* second_part, const T* x, const T* out, Rest... rest) {
  if (second_part && out) backward<T, true, true>(first_part, second_part, x, out, rest...);
  else if (second_part) backward<T, true, false>(first_part, second_part, x, out, rest...);
  else if (out) backward<T, false, true>(first_part, second_part, x, out, rest...);
  else backward<T, false, false>(first_part, second_part, x, out, rest...);
}

// Adds the gradient of the shortcut of option A (longtail.networks.fused.shortcut) to that of x.
template <class T>
void add_shortcut(const T* gradient, int64_t images, int64_t height, int64_t width, int64_t channels, int64_t stride,
                  int64_t new_channels, T* grad_x) {
  int64_t lines = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < images * lines; ++line)
    for (int64_t column = 0; column < columns; ++column) {
      T* to = grad_x + ((line / lines * height + line % lines * stride) * width + column * stride) * channels;
      const T* from = gradient + (line * columns + column) * (channels + new_channels) + new_channels / 2;
      by_lanes(channels, [&](auto all, int64_t c, int64_t width) {
        constexpr bool ALL = decltype(all)::value;
        store<ALL>(to + c, load<ALL>(to + c, width) + load<ALL>(from + c, width), width);
      });
    }
}

#ifdef __AVX512BF16__

// The weight gradient of a 3x3 convolution with padding 1 and stride 1 or 2: for each tap, a sum over pixels of
// x[stride * pixel + tap, in] * gradient[pixel, out]. The processor multiplies two pairs of bfloat16 and adds both
// products to a float, so pixels are taken two by two: LANES output channels are a register, the pair of an input
// channel is broadcast.

constexpr int64_t MANY_PAIRS = 128;  // at a time: sums are seldom loaded, pairs stay in the cache
constexpr int64_t GROUPS = 16;       // of images, each with its own sums: the result does not depend on the threads

struct alignas(64) Pairs {  // two pixels of LANES channels, the left one in the low halves
  uint32_t at[LANES];
};

inline __m512i pixel(const bfloat16* channels) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)channels));
}

inline void put(Pairs& to, __m512i left, __m512i right) {
  _mm512_store_si512(&to, _mm512_or_si512(left, _mm512_slli_epi32(right, 16)));
}

// The pairs that the three taps of a row meet at the output's pairs of pixels; zeros outside of the image.
// With stride 1 the right tap meets those of the left tap, one further on, so there is one more of them.
template <int STRIDE>
inline void pair_up(const bfloat16* line, int64_t pairs, int64_t channels, Pairs* left, Pairs* middle, Pairs* right) {
  __m512i before = _mm512_setzero_si512();
  for (int64_t pair = 0; pair < pairs; ++pair, line += 2 * STRIDE * channels) {
    __m512i first = pixel(line), second = pixel(line + channels);
    if (STRIDE == 1) {
      put(left[pair], before, first);
      put(middle[pair], first, second);
      before = second;
    } else {
      __m512i third = pixel(line + 2 * channels), fourth = pixel(line + 3 * channels);
      put(left[pair], before, second);
      put(middle[pair], first, third);
      put(right[pair], second, fourth);
      before = fourth;
    }
  }
  if (STRIDE == 1) put(left[pairs], before, _mm512_setzero_si512());
}

// Lines of pairs of some images, for LANES channels.
struct Lines {
  const Pairs* first;
  int64_t line, image;  // from one to the next
};

// sums[in][out lane] += over all images, `rows` lines of each and `pairs` pairs of a line; `fresh` sums start at 0. For IN
// input channels and OUT registers of output channels, which are `lanes` pairs apart: IN + OUT loads for IN * OUT
// products, so a tile of 8 x 2 is a tenth faster than one of 16 x 1.
template <int64_t IN, int64_t OUT>
inline void add_tap(Lines x, Lines gradient, int64_t lanes, int64_t images, int64_t rows, int64_t pairs, bool fresh,
                    float* sums, int64_t out) {
  __m512 total[IN][OUT];
#pragma GCC unroll 16
  for (int64_t in = 0; in < IN; ++in)
#pragma GCC unroll 16
    for (int64_t o = 0; o < OUT; ++o)
      total[in][o] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + in * out + o * LANES);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t row = 0; row < rows; ++row) {
      const Pairs* x_line = x.first + image * x.image + row * x.line;
      const Pairs* gradient_line = gradient.first + image * gradient.image + row * gradient.line;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh g[OUT];
#pragma GCC unroll 16
        for (int64_t o = 0; o < OUT; ++o) g[o] = (__m512bh)_mm512_load_si512(&gradient_line[pair + o * lanes]);
#pragma GCC unroll 16
        for (int64_t in = 0; in < IN; ++in) {
          __m512bh pair_of_x = (__m512bh)_mm512_set1_epi32(int(x_line[pair].at[in]));
#pragma GCC unroll 16
          for (int64_t o = 0; o < OUT; ++o) total[in][o] = _mm512_dpbf16_ps(total[in][o], g[o], pair_of_x);
        }
      }
    }
#pragma GCC unroll 16
  for (int64_t in = 0; in < IN; ++in)
#pragma GCC unroll 16
    for (int64_t o = 0; o < OUT; ++o) _mm512_storeu_ps(sums + in * out + o * LANES, total[in][o]);
}

// height and width are the gradient's, width even; those of x are `stride` times as large. in and out are multiples of
// LANES.
template <int STRIDE, int64_t IN, int64_t OUT>
void weight_gradient(const bfloat16* x, const bfloat16* gradient, int64_t images, int64_t height, int64_t width,
                     int64_t in, int64_t out, float* result) {
  int64_t pairs = width / 2, taps = 9 * in * out, groups = std::min(images, GROUPS);
  int64_t strip = std::min(height, std::max<int64_t>(1, MANY_PAIRS / pairs));  // rows and images
  int64_t stack = std::max<int64_t>(1, MANY_PAIRS / (pairs * strip));          // at a time
  int64_t lines = STRIDE * (strip - 1) + 3;                                    // of x, for the rows of a strip
  int64_t line = pairs + 1, x_tap = stack * lines * line * in / LANES, grad_image = strip * pairs;
  int64_t x_line = STRIDE * width * in, x_size = STRIDE * height * x_line;  // values of a line and an image of x
  std::unique_ptr<float[]> sums(new float[groups * taps]);  // not zeros: they would be written by one thread
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    std::unique_ptr<Pairs[]> x_pairs(new Pairs[3 * x_tap]), grad_pairs(new Pairs[stack * grad_image * out / LANES]);
    int64_t end = (group + 1) * images / groups;
    for (int64_t first = group * images / groups; first < end; first += stack)
      for (int64_t top = 0; top < height; top += strip) {
        int64_t rows = std::min(strip, height - top), here = std::min(stack, end - first);
        bool fresh = first == group * images / groups && top == 0;
        for (int64_t image = 0; image < here; ++image) {
          for (int64_t i = 0; i < in / LANES; ++i)
            for (int64_t row = 0; row < STRIDE * (rows - 1) + 3; ++row) {
              int64_t at = (i * stack + image) * lines + row;
              Pairs *left = &x_pairs[at * line], *middle = &x_pairs[x_tap + at * pairs], *right = left + 2 * x_tap;
              int64_t y = STRIDE * top + row - 1;
              if (y < 0 || y >= STRIDE * height) {
                for (Pairs* to : {left, right}) std::memset(to, 0, line * sizeof(Pairs));
                std::memset(middle, 0, pairs * sizeof(Pairs));
              } else {
                pair_up<STRIDE>(x + (first + image) * x_size + y * x_line + i * LANES, pairs, in, left, middle, right);
              }
            }
          for (int64_t o = 0; o < out / LANES; ++o) {
            const bfloat16* from = gradient + ((first + image) * height + top) * width * out + o * LANES;
            Pairs* to = &grad_pairs[(o * stack + image) * grad_image];
            for (int64_t pair = 0; pair < rows * pairs; ++pair)
              put(to[pair], pixel(from + 2 * pair * out), pixel(from + (2 * pair + 1) * out));
          }
        }
        // what comes next lies behind, and would come from memory: fetched bit by bit while this is worked on
        const char* next_x = (const char*)(x + (first + here - 1) * x_size + STRIDE * (top + rows) * x_line);
        const char* next_gradient = (const char*)(gradient + ((first + here - 1) * height + top + rows) * width * out);
        int64_t tiles = taps / (IN * OUT * LANES), x_share = 2 * here * STRIDE * rows * x_line / tiles + 1;
        int64_t gradient_share = 2 * here * rows * width * out / tiles + 1;
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t i = 0; i < in; i += IN)
            for (int64_t o = 0; o < out; o += OUT * LANES) {
              for (int64_t byte = 0; byte < x_share; byte += 64) __builtin_prefetch(next_x + byte, 0, 2);
              for (int64_t byte = 0; byte < gradient_share; byte += 64) __builtin_prefetch(next_gradient + byte, 0, 2);
              next_x += x_share, next_gradient += gradient_share;
              int64_t column = tap % 3, pitch = column == 1 ? pairs : line;
              int64_t start = (i / LANES * stack * lines + tap / 3) * pitch;
              start += column == 2 && STRIDE == 1 ? 1 : column * x_tap;
              const Pairs* x_first = (const Pairs*)&x_pairs[start].at[i % LANES];
              add_tap<IN, OUT>({x_first, STRIDE * pitch, lines * pitch},
                               {&grad_pairs[o / LANES * stack * grad_image], pairs, grad_image}, stack * grad_image,
                               here, rows, pairs, fresh, &sums[group * taps + (tap * in + i) * out + o], out);
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
                                         int64_t width, int64_t in, int64_t out, int64_t stride,
                                         float* result) {
  // both tiles add in the same order: the result does not depend on which one is taken
  bool wide = out % (2 * LANES) == 0;
  auto of_stride_1 = wide ? weight_gradient<1, LANES / 2, 2> : weight_gradient<1, LANES, 1>;
  auto of_stride_2 = wide ? weight_gradient<2, LANES / 2, 2> : weight_gradient<2, LANES, 1>;
  (stride == 1 ? of_stride_1 : of_stride_2)(x, gradient, images, height, width, in, out, result);
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
