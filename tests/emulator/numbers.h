// 16-bit floats, bit by bit: as the GPU rounds them, whatever the compiler offers.
#ifndef MLSTM_TESTS_EMULATOR_NUMBERS_H
#define MLSTM_TESTS_EMULATOR_NUMBERS_H

#include <bit>
#include <cmath>
#include <cstdint>

namespace emu {

inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float bf16_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
inline uint16_t float_bf16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_float(uint16_t x) {
  const uint32_t bits = (x & 0x7fffu) << 13;
  const bool finite = (x & 0x7c00) != 0x7c00;
  const float size = finite ? bits_float(bits) * 0x1p112f : bits_float(bits | 0x7f800000u);
  return (x & 0x8000) != 0 ? -size : size;
}
inline uint16_t float_f16(float x) {
  if (x != x) return 0x7fff;
  const auto sign = static_cast<uint16_t>(float_bits(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  uint32_t bits = float_bits(size);
  if (size >= 65520.0f) {
    bits = 0x7c00;
  } else if (size < 0x1p-14f) {
    // The sum's last digit is that of a denormal number.
    bits = float_bits(size + 0.5f) - float_bits(0.5f);
  } else {
    bits = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  }
  return static_cast<uint16_t>(sign | bits);
}

inline uint32_t pack_f16_finite(float high, float low) {
  const auto finite = [](float x) { return std::fmin(std::fmax(x, -65504.0f), 65504.0f); };
  // fmin and fmax would make a number of NaN.
  const auto half = [&](float x) { return float_f16(x != x ? x : finite(x)); };
  return static_cast<uint32_t>(half(high)) << 16 | half(low);
}

// Of ".ftz": denormal numbers count as zero.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_flushed(float x) { return flush(std::exp2(flush(x))); }
inline float reciprocal_flushed(float x) { return flush(1.0f / flush(x)); }

}  // namespace emu

#endif
