// Registers hold bit patterns; these functions give the patterns their values, as PTX defines them.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using s128 = __int128;

namespace ptx {

// What nobody has written holds this: NaN as float16, bfloat16, float32 and float64, and an address
// that lies in no tensor.
constexpr u16 kPoisonHalfWord = 0x7fff;
constexpr u64 kPoison = 0x7fff7fff7fff7fffull;

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ---- bit pattern -> value
inline float f32(u64 bits) { return bit_cast<float>(static_cast<u32>(bits)); }
inline double f64(u64 bits) { return bit_cast<double>(bits); }
inline float f16(u64 bits) { return bit_cast<_Float16>(static_cast<u16>(bits)); }
inline float bf16(u64 bits) { return bit_cast<float>(static_cast<u32>(bits) << 16); }

// ---- value -> bit pattern, rounding to nearest even
inline u32 to_f32(float value) { return bit_cast<u32>(value); }
inline u64 to_f64(double value) { return bit_cast<u64>(value); }
inline u16 to_f16(float value) { return bit_cast<u16>(static_cast<_Float16>(value)); }
inline u16 to_f16_from_double(double value) { return bit_cast<u16>(static_cast<_Float16>(value)); }

inline u16 to_bf16(float value) {
    if (std::isnan(value)) return 0x7fff;  // the canonical NaN of PTX
    const u32 bits = bit_cast<u32>(value);
    return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline u16 to_bf16_toward_zero(float value) {
    return std::isnan(value) ? 0x7fff : static_cast<u16>(bit_cast<u32>(value) >> 16);
}

// cvt.rna.tf32: 10 bits of mantissa are kept, ties go away from zero.
inline u32 to_tf32(float value) { return (bit_cast<u32>(value) + 0x1000) & ~0x1fffu; }

inline u32 pack(u16 low, u16 high) { return low | static_cast<u32>(high) << 16; }

// .ftz: a subnormal float32 counts as a zero of its sign.
inline float flush(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// ---- minimum and maximum. PTX drops a NaN if the other operand is a number, and orders -0 < +0.
template <class Float>
inline Float min_number(Float a, Float b) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == 0 && b == 0) return std::signbit(a) ? a : b;
    return a < b ? a : b;
}

template <class Float>
inline Float max_number(Float a, Float b) {
    if (std::isnan(a)) return b;
    if (std::isnan(b)) return a;
    if (a == 0 && b == 0) return std::signbit(a) ? b : a;
    return a > b ? a : b;
}

// The same with .NaN: either operand's NaN wins.
template <class Float>
inline Float min_nan(Float a, Float b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<Float>::quiet_NaN();
    return min_number(a, b);
}

template <class Float>
inline Float max_nan(Float a, Float b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<Float>::quiet_NaN();
    return max_number(a, b);
}

// .sat: into [0, 1]; NaN becomes 0.
inline float saturate(float value) { return max_number(0.0f, min_number(1.0f, value)); }

// Fused multiply-add of 16-bit floats: the double holds the product exactly.
inline float fma_half(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * b + c);
}

// ---- rounding
enum class Rounding { nearest, zero, down, up };

template <class Float>
inline Float round_to_integral(Float value, Rounding mode) {
    switch (mode) {
        case Rounding::nearest: return std::nearbyint(value);
        case Rounding::zero: return std::trunc(value);
        case Rounding::down: return std::floor(value);
        default: return std::ceil(value);
    }
}

// Float to integer: saturating, NaN becomes 0.
template <class Integer, class Float>
inline Integer to_integer(Float value, Rounding mode) {
    if (std::isnan(value)) return 0;
    const Float rounded = round_to_integral(value, mode);
    if (rounded <= static_cast<Float>(std::numeric_limits<Integer>::min()))
        return std::numeric_limits<Integer>::min();
    if (rounded >= static_cast<Float>(std::numeric_limits<Integer>::max()))
        return std::numeric_limits<Integer>::max();
    return static_cast<Integer>(rounded);
}

enum class Operation { add, sub, mul, fma, div };

// One operation under a directed rounding mode. The operands are volatile so that the compiler
// cannot evaluate the operation outside the mode.
template <class Float>
__attribute__((noinline)) inline Float rounded(Operation operation, Rounding mode, volatile Float a,
                                               volatile Float b, volatile Float c) {
    const int before = std::fegetround();
    std::fesetround(mode == Rounding::zero   ? FE_TOWARDZERO
                    : mode == Rounding::down ? FE_DOWNWARD
                                             : FE_UPWARD);
    volatile Float result = 0;
    switch (operation) {
        case Operation::add: result = a + b; break;
        case Operation::sub: result = a - b; break;
        case Operation::mul: result = a * b; break;
        case Operation::fma: result = std::fma(Float(a), Float(b), Float(c)); break;
        case Operation::div: result = a / b; break;
    }
    std::fesetround(before);
    return result;
}

}  // namespace ptx
