// What is done with many entries on the CPU, in one pass each: see gmt_tune.masking.places and nonfinite.
#include <algorithm>

#include "places.h"

namespace {

template <typename Word, Word kInfinity>
Word any_nonfinite(const Word* values, int64_t first, int64_t stop) {
  Word any = 0;
  for (int64_t i = first; i < stop; ++i) any |= Word((values[i] & kInfinity) == kInfinity);
  return any;
}

template <typename Word, Word kInfinity>
bool is_nonfinite(const Word* values, int64_t n, int threads) {
  constexpr int64_t kBlock = 1 << 14;
  Word found = 0;
#pragma omp parallel for num_threads(threads) reduction(| : found) if (n > kBlock)
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t stop = n - first < kBlock ? n : first + kBlock;
    found |= any_nonfinite<Word, kInfinity>(values, first, stop);
  }
  return found != 0;
}

// Selected entries, written or added; and whether NaN or infinity is among all entries, if that is asked. A segment is
// looked at right before its entries are read: they are in the cache then.
template <typename T, typename Word, Word kInfinity>
bool gather(const Places& places, const T* from, T* to, bool adds, bool checks, int threads) {
  Word found = 0;
#pragma omp parallel for num_threads(threads) reduction(| : found) if (places.segments > 1)
  for (int64_t segment = 0; segment < places.segments; ++segment) {
    const int64_t base = segment << kSegmentBits, end = base + (int64_t(1) << kSegmentBits);
    if (checks)
      found |= any_nonfinite<Word, kInfinity>(reinterpret_cast<const Word*>(from), base,
                                              end < places.numel ? end : places.numel);
    const int64_t stop = places.starts[segment + 1], chunk = places.chunk();
    for (int64_t first = places.starts[segment]; first < stop; first += chunk) {
      const int64_t n = stop - first < chunk ? stop - first : chunk;
      int64_t index[kChunk];
      places.locate(first, n, index);
      if (adds)
        for (int64_t j = 0; j < n; ++j) to[first + j] = float(to[first + j]) + float(from[index[j]]);
      else
        for (int64_t j = 0; j < n; ++j) to[first + j] = from[index[j]];
    }
  }
  return found != 0;
}

template <typename Word, Word kMagnitude>
void count(const Word* values, int64_t n, Word low, Word high, int64_t* counts, int64_t* largest, int threads) {
  constexpr int64_t kBlock = 1 << 14;  // whose counts fit into 16 bits
  int64_t at_low = 0, at_high = 0, most = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : at_low, at_high) reduction(max : most) if (n > kBlock)
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t stop = n - first < kBlock ? n : first + kBlock;
    Word block_low = 0, block_high = 0, block_most = 0;
    for (int64_t i = first; i < stop; ++i) {
      const Word magnitude = values[i] & kMagnitude;
      block_low += magnitude >= low;
      block_high += magnitude >= high;
      block_most = magnitude > block_most ? magnitude : block_most;
    }
    at_low += block_low, at_high += block_high;
    most = block_most > most ? block_most : most;
  }
  counts[0] = at_low, counts[1] = at_high, *largest = most;
}

// A bit for each of at most 64 values: whether its magnitude has at least these bits.
template <typename Word, Word kMagnitude>
uint64_t at_least(const Word* values, int64_t n, Word smallest) {
  uint8_t kept[64] = {};
  for (int64_t j = 0; j < n; ++j) kept[j] = (values[j] & kMagnitude) >= smallest;
  uint64_t bits = 0;
  for (int64_t j = 0; j < 64; j += 8) {
    uint64_t word;
    std::memcpy(&word, kept + j, 8);
    bits |= (word * 0x0102040810204080 >> 56) << j;  // its bytes' lowest bits, in order
  }
  return bits;
}

template <typename Word, Word kMagnitude>
void pack(const Word* values, int64_t n, Word smallest, uint8_t* bits, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1 << 14)
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t here = n - i < 64 ? n - i : 64;
    const uint64_t kept = at_least<Word, kMagnitude>(values + i, here, smallest);
    std::memcpy(bits + i / 8, &kept, (here + 7) / 8);
  }
}

constexpr int64_t kAllTies = -1;

// For each segment how many entries to keep, and how many of those that tie at the smallest magnitude, the first ones.
template <typename Word, Word kMagnitude>
void count_largest(const Word* values, int64_t n, Word smallest, int64_t most, int64_t* counts, int64_t* ties,
                   int threads) {
  const int64_t segments = (n + (int64_t(1) << kSegmentBits) - 1) >> kSegmentBits;
#pragma omp parallel for num_threads(threads) reduction(- : most) if (segments > 1)
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t first = segment << kSegmentBits, size = std::min(n - first, int64_t(1) << kSegmentBits);
    int64_t at_and_above[2], largest;
    count<Word, kMagnitude>(values + first, size, smallest, Word(smallest + 1), at_and_above, &largest, 1);
    ties[segment] = at_and_above[0] - at_and_above[1], counts[segment] = at_and_above[1];
    most -= at_and_above[1];
  }
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t kept = std::max(std::min(ties[segment], most), int64_t(0));
    counts[segment] += kept, most -= kept;
    ties[segment] = kept == ties[segment] ? kAllTies : kept;
  }
}

// Those entries, by their offsets or as bits.
template <typename Word, Word kMagnitude>
void place_largest(const Word* values, int64_t n, Word smallest, const int64_t* starts, const int64_t* ties,
                   uint16_t* offsets, uint8_t* bits, int threads) {
#pragma omp parallel for num_threads(threads) if (n >> kSegmentBits > 0)
  for (int64_t base = 0; base < n; base += int64_t(1) << kSegmentBits) {
    const int64_t segment = base >> kSegmentBits, stop = std::min(n, base + (int64_t(1) << kSegmentBits));
    const Word lowest = ties[segment] == 0 ? smallest + 1 : smallest;
    int64_t ties_left = ties[segment], to = starts[segment];
    for (int64_t i = base; i < stop; i += 64) {
      const int64_t here = std::min(stop - i, int64_t(64));
      uint64_t kept = at_least<Word, kMagnitude>(values + i, here, lowest);
      if (ties[segment] > 0)
        for (uint64_t left = kept; left != 0; left &= left - 1) {
          const int j = __builtin_ctzll(left);
          if ((values[i + j] & kMagnitude) == smallest && --ties_left < 0) kept ^= uint64_t(1) << j;
        }
      if (bits != nullptr)
        std::memcpy(bits + i / 8, &kept, (here + 7) / 8);
      else
        for (; kept != 0; kept &= kept - 1) offsets[to++] = uint16_t(i + __builtin_ctzll(kept));
    }
  }
}

template <typename T>
void take_ranked(const T* from, const int32_t* rank, int64_t n, int32_t first, T* to, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1 << 14)
  for (int64_t j = 0; j < n; ++j) to[j] = rank[j] < 0 ? 0 : from[rank[j] - first];
}

}  // namespace

extern "C" {

// 1 bit for each bfloat16 (2 bytes) or float32 (4) value: whether its magnitude has at least these bits.
void pack_entries(const void* values, int64_t n, int bytes, uint32_t smallest, uint8_t* bits, int threads) {
  if (bytes == 2)
    pack<uint16_t, 0x7fff>(static_cast<const uint16_t*>(values), n, uint16_t(smallest), bits, threads);
  else
    pack<uint32_t, 0x7fffffff>(static_cast<const uint32_t*>(values), n, smallest, bits, threads);
}

// Flat indices of `n` selected entries from number `first` on.
void indices(const Places* places, int64_t first, int64_t n, int64_t* index, int threads) {
#pragma omp parallel for num_threads(threads) if (n > kChunk)
  for (int64_t done = 0; done < n; done += kChunk)
    places->locate(first + done, n - done < kChunk ? n - done : kChunk, index + done);
}

// Selected entries of bfloat16 (2 bytes) or float32 (4); returns whether an entry, selected or not, is NaN or infinity.
int gather_entries(const Places* places, const void* from, void* to, int bytes, int adds, int checks, int threads) {
  if (bytes == 2)
    return gather<BFloat16, uint16_t, 0x7f80>(*places, static_cast<const BFloat16*>(from), static_cast<BFloat16*>(to),
                                              adds, checks, threads);
  return gather<float, uint32_t, 0x7f800000>(*places, static_cast<const float*>(from), static_cast<float*>(to), adds,
                                             checks, threads);
}

// Whether NaN or infinity is among bfloat16 (2 bytes) or float32 (4) values.
int nonfinite_entries(const void* values, int64_t n, int bytes, int threads) {
  return bytes == 2 ? is_nonfinite<uint16_t, 0x7f80>(static_cast<const uint16_t*>(values), n, threads)
                    : is_nonfinite<uint32_t, 0x7f800000>(static_cast<const uint32_t*>(values), n, threads);
}

// How many entries of each segment are selected.
void count_bits(const Places* places, int64_t* counts, int threads) {
#pragma omp parallel for num_threads(threads) if (places->segments > 1)
  for (int64_t segment = 0; segment < places->segments; ++segment) {
    const int64_t first = segment << (kSegmentBits - 6), words = (places->numel + 63) / 64;
    const int64_t stop = words - first < 1024 ? words : first + 1024;
    int64_t ones = 0;
    for (int64_t i = first; i < stop; ++i) ones += __builtin_popcountll(places->word(i));
    counts[segment] = ones;
  }
}

// Offsets in their segments of the entries that bits select.
void offsets_of_bits(const Places* places, uint16_t* offsets, int threads) {
  const int64_t count = places->count();
#pragma omp parallel for num_threads(threads) if (count > kChunk)
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t n = count - first < kChunk ? count - first : kChunk;
    int64_t index[kChunk];
    places->locate(first, n, index);
    for (int64_t j = 0; j < n; ++j) offsets[first + j] = uint16_t(index[j]);
  }
}

// How many magnitudes of bfloat16 (2 bytes) or float32 (4) values have at least these bits, and the largest of all.
void count_entries(const void* values, int64_t n, int bytes, uint32_t low, uint32_t high, int64_t* counts,
                   int64_t* largest, int threads) {
  if (bytes == 2)
    count<uint16_t, 0x7fff>(static_cast<const uint16_t*>(values), n, uint16_t(low), uint16_t(high), counts, largest,
                            threads);
  else
    count<uint32_t, 0x7fffffff>(static_cast<const uint32_t*>(values), n, low, high, counts, largest, threads);
}

// The magnitude bits of float32 values from `low` on and below `high`, in any order; returns how many these are.
int64_t pick_between(const uint32_t* values, int64_t n, uint32_t low, uint32_t high, int32_t* picked, int threads) {
  constexpr int64_t kBlock = 1 << 14;
  int64_t found = 0;
#pragma omp parallel for num_threads(threads) if (n > kBlock)
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t stop = n - first < kBlock ? n : first + kBlock;
    for (int64_t start = first; start < stop; start += 64) {
      const int64_t end = stop - start < 64 ? stop : start + 64;
      uint32_t any = 0;
      for (int64_t i = start; i < end; ++i) any |= (values[i] & 0x7fffffff) - low < high - low;
      for (int64_t i = start; any && i < end; ++i) {
        const uint32_t magnitude = values[i] & 0x7fffffff;
        if (magnitude - low >= high - low) continue;
        int64_t at;
#pragma omp atomic capture
        at = found++;
        picked[at] = int32_t(magnitude);
      }
    }
  }
  return found;
}

// For each segment, how many of its bfloat16 (2 bytes) or float32 (4) values to keep, whose magnitude has at least these
// bits: `most` in all, of those that tie the first ones. And how many such ties, for what places them.
void count_largest_entries(const void* values, int64_t n, int bytes, uint32_t smallest, int64_t most, int64_t* counts,
                           int64_t* ties, int threads) {
  if (bytes == 2)
    count_largest<uint16_t, 0x7fff>(static_cast<const uint16_t*>(values), n, uint16_t(smallest), most, counts, ties,
                                    threads);
  else
    count_largest<uint32_t, 0x7fffffff>(static_cast<const uint32_t*>(values), n, smallest, most, counts, ties, threads);
}

// Where these are: as 1 bit for each entry, or without memory for that as offsets in their segments.
void place_largest_entries(const void* values, int64_t n, int bytes, uint32_t smallest, const int64_t* starts,
                           const int64_t* ties, uint16_t* offsets, uint8_t* bits, int threads) {
  if (bytes == 2)
    place_largest<uint16_t, 0x7fff>(static_cast<const uint16_t*>(values), n, uint16_t(smallest), starts, ties, offsets,
                                    bits, threads);
  else
    place_largest<uint32_t, 0x7fffffff>(static_cast<const uint32_t*>(values), n, smallest, starts, ties, offsets, bits,
                                        threads);
}

// For each entry that is selected now, its number among those that were before, or -1.
void ranks_in(const Places* now, const Places* before, int32_t* rank, int threads) {
#pragma omp parallel for num_threads(threads) if (now->segments > 1)
  for (int64_t segment = 0; segment < now->segments; ++segment) {
    int64_t old_index[kChunk], index[kChunk];
    int64_t old = before->starts[segment], old_n = 0, old_j = 0;
    const int64_t old_stop = before->starts[segment + 1], stop = now->starts[segment + 1];
    for (int64_t first = now->starts[segment]; first < stop; first += now->chunk()) {
      const int64_t n = stop - first < now->chunk() ? stop - first : now->chunk();
      now->locate(first, n, index);
      for (int64_t j = 0; j < n; ++j) {
        for (;; ++old_j) {
          if (old_j == old_n) {  // the next ones, if there are any
            old += old_n, old_j = 0;
            old_n = old_stop - old < before->chunk() ? old_stop - old : before->chunk();
            if (old_n == 0) break;
            before->locate(old, old_n, old_index);
          }
          if (old_index[old_j] >= index[j]) break;
        }
        rank[first + j] = old_n > 0 && old_index[old_j] == index[j] ? int32_t(old + old_j) : -1;
      }
    }
  }
}

// Values of 2 or 4 bytes by their numbers, of which `first` is the lowest that there is; zero where the number is -1.
void take_ranked_entries(const void* from, const int32_t* rank, int64_t n, int32_t first, void* to, int bytes,
                         int threads) {
  if (bytes == 2)
    take_ranked(static_cast<const uint16_t*>(from), rank, n, first, static_cast<uint16_t*>(to), threads);
  else
    take_ranked(static_cast<const uint32_t*>(from), rank, n, first, static_cast<uint32_t*>(to), threads);
}

}  // extern "C"
