// Integer instructions of PTX that C++ has no operator for.
#pragma once

#include <algorithm>
#include <type_traits>

#include "values.h"

namespace ptx {

// Shifts clamp their count to the width of the register.
template <class Unsigned>
inline Unsigned shift_left(Unsigned value, u32 count) {
    return count >= sizeof(Unsigned) * 8 ? Unsigned(0) : static_cast<Unsigned>(value << count);
}

template <class Integer>
inline Integer shift_right(Integer value, u32 count) {
    constexpr u32 width = sizeof(Integer) * 8;
    if (std::is_signed<Integer>::value) count = std::min(count, width - 1);
    return count >= width ? Integer(0) : static_cast<Integer>(value >> count);
}

// shf: a shift of the 64 bits `high:low`, of which one half is kept.
inline u32 funnel_left(u32 low, u32 high, u32 count) {
    return static_cast<u32>(((static_cast<u64>(high) << 32 | low) << count) >> 32);
}

inline u32 funnel_right(u32 low, u32 high, u32 count) {
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> count);
}

// prmt: each nibble of `selector` picks one of eight bytes, or that byte's sign.
inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> (4 * i) & 15;
        u32 byte = bytes >> (8 * (choice & 7)) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// lop3: bit i of `table` is the result where (a, b, c) spell i.
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; i++) {
        if (!(table >> i & 1)) continue;
        result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
}

// bfe: `length` bits from `position` on; a signed field is extended with its own top bit.
template <class Integer>
inline Integer extract_bits(Integer value, u32 position, u32 length) {
    using Unsigned = typename std::make_unsigned<Integer>::type;
    constexpr u32 width = sizeof(Integer) * 8;
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const Unsigned bits = static_cast<Unsigned>(value);
    const u32 top = std::min(position + length - 1, width - 1);
    const bool negative = std::is_signed<Integer>::value && (bits >> top & 1);
    Unsigned result = negative ? ~Unsigned(0) : Unsigned(0);
    for (u32 i = 0; i < length && i < width; i++) {
        const bool bit = position + i < width ? bits >> (position + i) & 1 : negative;
        const Unsigned mask = Unsigned(1) << i;
        result = bit ? result | mask : result & ~mask;
    }
    return static_cast<Integer>(result);
}

// bfi: the low `length` bits of `field` replace those of `into` from `position` on.
template <class Unsigned>
inline Unsigned insert_bits(Unsigned field, Unsigned into, u32 position, u32 length) {
    constexpr u32 width = sizeof(Unsigned) * 8;
    position &= 255;
    length &= 255;
    if (position >= width || length == 0) return into;
    const Unsigned ones = length >= width ? ~Unsigned(0) : (Unsigned(1) << length) - 1;
    const Unsigned mask = ones << position;
    return (into & ~mask) | (field << position & mask);
}

template <class Unsigned>
inline Unsigned reverse_bits(Unsigned value) {
    constexpr u32 width = sizeof(Unsigned) * 8;
    Unsigned result = 0;
    for (u32 i = 0; i < width; i++) result |= (value >> i & 1) << (width - 1 - i);
    return result;
}

template <class Unsigned>
inline u32 leading_zeros(Unsigned value) {
    constexpr u32 width = sizeof(Unsigned) * 8;
    return value ? __builtin_clzll(value) - (64 - width) : width;
}

// bfind: position of the highest bit that is not the sign, or -1.
template <class Integer>
inline u32 highest_bit(Integer value) {
    const Integer magnitude = value < 0 ? ~value : value;
    return magnitude ? 63 - __builtin_clzll(static_cast<u64>(magnitude)) : ~0u;
}

// Division by zero is defined (all ones, and the dividend as the remainder), and so is the
// overflow of dividing the smallest integer by -1.
template <class Integer>
inline Integer divide(Integer a, Integer b) {
    if (b == 0) return static_cast<Integer>(~Integer(0));
    if (std::is_signed<Integer>::value && b == Integer(-1)) {
        return static_cast<Integer>(u64(0) - static_cast<u64>(a));
    }
    return static_cast<Integer>(a / b);
}

template <class Integer>
inline Integer remainder_of(Integer a, Integer b) {
    if (b == 0) return a;
    if (std::is_signed<Integer>::value && b == Integer(-1)) return 0;
    return static_cast<Integer>(a % b);
}

template <class Integer>
inline Integer saturating_cast(s128 value) {
    const s128 low = std::numeric_limits<Integer>::min();
    const s128 high = std::numeric_limits<Integer>::max();
    return static_cast<Integer>(std::min(std::max(value, low), high));
}

}  // namespace ptx
