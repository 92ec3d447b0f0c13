// CompactAdamW's update of selected entries on the CPU, in one pass: what gmt_tune.optim.states does in many.
#include <cmath>
#include <type_traits>

#include "../masking/native/places.h"

namespace {

constexpr int64_t kBlock = 256;  // entries of 8-bit states that share a scale

struct Group {
  float lr, decay, rest1, rest2, eps;  // decay is 1 - lr * weight_decay, rest 1 - beta
  const float* minus_correction1;  // -(1 - beta^age) for each age from 0 on
  const float* minus_correction2;
};

// A moment: float32 values, or codes with the scale of each block, the values that codes stand for, and for each upper
// half of a float32 the lowest code of such values and the first value with the next one.
struct Moment {
  float* values;
  uint8_t* codes;
  float* scale;
  const float* qmap;
  const uint8_t* lowest;
  const float* next_from;

  void read(int64_t first, int64_t n, float* to) const {
    if (values != nullptr)
      std::memcpy(to, values + first, n * sizeof(float));
    else
      for (int64_t j = 0; j < n; ++j) to[j] = qmap[codes[first + j]] * scale[(first + j) / kBlock];
  }

  void write(int64_t first, int64_t n, const float* from) const {
    if (values != nullptr) {
      std::memcpy(values + first, from, n * sizeof(float));
      return;
    }
    for (int64_t start = 0; start < n; start += kBlock) {
      float largest = 0;
      for (int64_t j = start; j < start + kBlock; ++j) {
        const float magnitude = std::fabs(from[j]);
        largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
      }
      largest = largest < 1e-12f ? 1e-12f : largest;
      scale[(first + start) / kBlock] = largest;
      for (int64_t j = start; j < start + kBlock; ++j) {
        const float value = from[j] / largest;
        uint32_t word;
        std::memcpy(&word, &value, 4);
        word >>= 16;
        codes[first + j] = lowest[word] + (value >= next_from[word]);
      }
    }
  }
};

uint32_t hash(uint64_t seed, uint64_t i) {  // splitmix64
  uint64_t z = seed + i * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return uint32_t((z ^ (z >> 31)) >> 32);
}

void round_by_chance(BFloat16& to, float value, uint32_t random) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  const bool is_finite = (wide & 0x7f800000) != 0x7f800000;
  if (is_finite)
    to.bits = (wide + (random & 0xffff)) >> 16;
  else
    to = value;
}
void round_by_chance(float& to, float value, uint32_t) { to = value; }

// One update of the selected entries of a tensor; weights and gradients are bfloat16 (2 bytes) or float32 (4).
struct Tensor {
  Places places;
  void* weights;
  const void* grads;
  int16_t* ages;      // of each entry, counted up; null where all have the same, which is
  const float* step;  // counted up before
  Moment first_moment, second_moment;
  int64_t size;
  int64_t seed;  // of stochastic rounding; below 0: round to the nearest
  int32_t weight_bytes, grad_bytes;
};

// Entries are located `kChunk` at a time and updated `kPart` at a time, whole blocks where states are in such. Meanwhile
// the weights of those that come `kAhead` later are fetched, into the second cache: the first has too little room for
// what is under way.
constexpr int64_t kAhead = 64;

template <int64_t kPart, typename W, typename G>
void update(const Tensor& tensor, const Group& group) {
  const Places& places = tensor.places;
  const Moment &first_moment = tensor.first_moment, &second_moment = tensor.second_moment;
  W* weights = static_cast<W*>(tensor.weights);
  const G* grads = static_cast<const G*>(tensor.grads);
  int16_t* __restrict ages = tensor.ages;
  const int64_t count = places.count(), size = tensor.size, seed = tensor.seed;
  const float lr = group.lr, decay = group.decay, rest1 = group.rest1, rest2 = group.rest2, eps = group.eps;
  const float *correction1 = group.minus_correction1, *correction2 = group.minus_correction2;
  const int32_t common_age = tensor.step == nullptr ? 0 : *tensor.step < INT16_MAX ? int32_t(*tensor.step) : INT16_MAX;
  constexpr int64_t kRoom = kPart + 16;  // arrays that lie a power of two apart get in each other's way in the cache
  constexpr std::integral_constant<int64_t, kPart> kAll;
#pragma omp for schedule(static) nowait
  for (int64_t start = 0; start < size; start += kChunk) {
    const int64_t left = count - start < 0 ? 0 : count - start;  // behind these lies padding
    const int64_t located = left < kChunk ? left : kChunk, stop = size - start < kChunk ? size - start : kChunk;
    int64_t indices[kChunk + kAhead];
    places.locate(start, located, indices);
    for (int64_t j = located; j < located + kAhead; ++j) indices[j] = 0;
    const auto update_part = [&](int64_t done, auto n, auto held) {  // numbers that are constants where all are there
      const int64_t first = start + done, *index = indices + done;
      float w[kRoom], g[kRoom], m[kRoom], v[kRoom], c1[kRoom], c2[kRoom];
      int32_t age[kRoom];
      W raw[kRoom];
      for (int64_t j = 0; j < held; ++j) __builtin_prefetch(weights + index[j + kAhead], 0, 2);
      for (int64_t j = 0; j < held; ++j) raw[j] = weights[index[j]];
      for (int64_t j = held; j < n; ++j) raw[j] = 0.0f;
      for (int64_t j = 0; j < n; ++j) w[j] = raw[j];
      first_moment.read(first, n, m);
      second_moment.read(first, n, v);
      if (ages != nullptr) {
        for (int64_t j = 0; j < n; ++j) ages[first + j] += ages[first + j] < INT16_MAX;
        for (int64_t j = 0; j < n; ++j) age[j] = ages[first + j];
      } else {
        for (int64_t j = 0; j < n; ++j) age[j] = common_age;
      }
      for (int64_t j = 0; j < n; ++j) c1[j] = correction1[age[j]];
      for (int64_t j = 0; j < n; ++j) c2[j] = correction2[age[j]];
      for (int64_t j = 0; j < n; ++j) g[j] = grads[first + j];
      for (int64_t j = 0; j < n; ++j) {
        m[j] = std::fma(rest1, g[j] - m[j], m[j]);
        v[j] = std::fma(rest2, g[j] * g[j] - v[j], v[j]);
        const float root = (std::sqrt(-(v[j] / c2[j])) + eps) * c1[j];
        w[j] = w[j] * decay + m[j] / root * lr;  // the corrections are negative
      }
      first_moment.write(first, n, m);
      second_moment.write(first, n, v);
      if (seed < 0)
        for (int64_t j = 0; j < n; ++j) raw[j] = w[j];
      else
        for (int64_t j = 0; j < n; ++j) round_by_chance(raw[j], w[j], hash(seed, first + j));
      for (int64_t j = 0; j < held; ++j) weights[index[j]] = raw[j];
    };
    int64_t done = 0;
    for (; done + kPart <= located; done += kPart) update_part(done, kAll, kAll);
    for (; done < stop; done += kPart) {
      const int64_t n = stop - done < kPart ? stop - done : kPart, held = located - done < 0 ? 0 : located - done;
      update_part(done, n, held < n ? held : n);
    }
  }
}

template <typename W, typename G>
void update_in_parts(const Tensor& tensor, const Group& group) {
  if (tensor.first_moment.codes != nullptr || tensor.second_moment.codes != nullptr)
    update<kBlock, W, G>(tensor, group);
  else
    update<64, W, G>(tensor, group);
}

}  // namespace

extern "C" void adamw(const Tensor* tensors, int64_t n, const Group* group, int threads) {
  // Each thread has a share of every tensor, and waits for the others behind the last one alone
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& tensor = tensors[i];
    if (tensor.weight_bytes == 2)
      (tensor.grad_bytes == 2 ? update_in_parts<BFloat16, BFloat16> : update_in_parts<BFloat16, float>)(tensor, *group);
    else
      (tensor.grad_bytes == 2 ? update_in_parts<float, BFloat16> : update_in_parts<float, float>)(tensor, *group);
  }
}
