// Places of selected entries, as gmt_tune.masking.places keeps them, and the floating-point types of what lies there.
#pragma once

#include <cstdint>
#include <cstring>

constexpr int64_t kSegmentBits = 16;  // of an offset: entries lie in segments of 65,536
constexpr int64_t kChunk = 1024;  // the most selected entries that a thread handles at a time

struct Places {
  const uint16_t* offsets;  // of selected entries in their segments; null where `bits` say what is selected
  const uint8_t* bits;      // 1 for each entry of the tensor, from the lowest bit of each byte on
  const int64_t* starts;    // how many selected entries lie before each segment, and in all; null: all are
  int64_t segments;
  int64_t numel;  // of the tensor

  bool has_all() const { return starts == nullptr; }
  // Few at a time are fastest: the processor reads ahead into the next ones. But of bits, the first must be counted to.
  int64_t chunk() const { return bits != nullptr ? kChunk : 64; }
  int64_t count() const { return has_all() ? numel : starts[segments]; }

  uint64_t word(int64_t i) const {  // the bits of entries from 64 * i on; zeros behind the end
    const int64_t first = i * 8, bytes = (numel + 7) / 8 - first;
    uint64_t word = 0;
    std::memcpy(&word, bits + first, bytes < 8 ? bytes : 8);
    return word;
  }

  // Flat indices of the `n` selected entries from number `first` on, which there are.
  void locate(int64_t first, int64_t n, int64_t* index) const {
    if (has_all()) {
      for (int64_t j = 0; j < n; ++j) index[j] = first + j;
      return;
    }
    int64_t low = 0, high = segments;  // the last segment that starts at `first` or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts[middle] <= first ? low : high) = middle;
    }
    for (int64_t segment = low; n > 0; ++segment) {
      const int64_t skip = first - starts[segment], left = starts[segment + 1] - first;
      const int64_t here = left < n ? left : n, base = segment << kSegmentBits;
      if (offsets != nullptr) {
        for (int64_t j = 0; j < here; ++j) index[j] = base + offsets[first + j];
      } else if (here > 0) {
        locate_bits(base, skip, here, index);
      }
      first += here, index += here, n -= here;
    }
  }

 private:
  void locate_bits(int64_t base, int64_t skip, int64_t n, int64_t* index) const {
    int64_t i = base / 64;
    uint64_t left = word(i);
    for (int64_t ones; skip >= (ones = __builtin_popcountll(left)); left = word(++i)) skip -= ones;
    for (; skip > 0; --skip) left &= left - 1;
    for (int64_t j = 0; j < n; left &= left - 1) {
      while (left == 0) left = word(++i);
      index[j++] = i * 64 + __builtin_ctzll(left);
    }
  }
};

struct BFloat16 {
  uint16_t bits;

  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }

  BFloat16& operator=(float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return *this;
  }
};
