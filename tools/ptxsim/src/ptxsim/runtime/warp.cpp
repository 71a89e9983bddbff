#include "warp.h"

#include <algorithm>

#include "block.h"

namespace ptx {

Shuffled shuffle(Shuffle mode, u32 value, u32 lane, u32 clamp, u32 members, int line) {
    const u64 word = value;
    const Deposits& deposits = block.exchange(members, &word, 1, "shfl.sync", line);
    // `clamp` holds a segment mask in bits 8-12 and the last lane of a segment in bits 0-4.
    const int me = static_cast<int>(block.lane());
    const int segment = clamp >> 8 & 31;
    const int last = (me & segment) | (static_cast<int>(clamp & 31) & ~segment);
    const int first = me & segment;
    const int operand = static_cast<int>(lane & 31);
    int from = 0;
    bool in_range = false;
    switch (mode) {
        case Shuffle::up:
            from = me - operand;
            in_range = from >= last;
            break;
        case Shuffle::down:
            from = me + operand;
            in_range = from <= last;
            break;
        case Shuffle::butterfly:
            from = me ^ operand;
            in_range = from <= last;
            break;
        case Shuffle::index:
            from = first | (operand & ~segment);
            in_range = from <= last;
            break;
    }
    if (!in_range) from = me;
    if (!(members >> from & 1)) block.fail("shfl.sync reads a lane outside its member mask", line);
    if (!(deposits.lanes >> from & 1)) block.fail("shfl.sync reads a lane that returned", line);
    return {static_cast<u32>(deposits[from][0]), in_range};
}

u32 vote(Vote mode, bool predicate, u32 members, int line) {
    const u64 word = predicate;
    const Deposits& deposits = block.exchange(members, &word, 1, "vote.sync", line);
    const u32 voters = deposits.lanes;
    u32 ballot = 0;
    for (u32 l = 0; l < kLanes; l++) {
        if (voters >> l & 1) ballot |= static_cast<u32>(deposits[l][0]) << l;
    }
    switch (mode) {
        case Vote::ballot: return ballot;
        case Vote::all: return ballot == voters;
        case Vote::any: return ballot != 0;
        default: return ballot == 0 || ballot == voters;
    }
}

namespace {

u32 combine(Reduction operation, u32 a, u32 b) {
    switch (operation) {
        case Reduction::add: return a + b;
        case Reduction::min_unsigned: return std::min(a, b);
        case Reduction::max_unsigned: return std::max(a, b);
        case Reduction::min_signed: return std::min<s32>(a, b);
        case Reduction::max_signed: return std::max<s32>(a, b);
        case Reduction::and_: return a & b;
        case Reduction::or_: return a | b;
        default: return a ^ b;
    }
}

u32 combine(FloatReduction operation, u32 a, u32 b) {
    const float x = f32(a), y = f32(b);
    if (operation.keep_nan) return to_f32(operation.maximum ? max_nan(x, y) : min_nan(x, y));
    return to_f32(operation.maximum ? max_number(x, y) : min_number(x, y));
}

template <class Operation>
u32 fold(Operation operation, u32 value, u32 members, int line) {
    const u64 word = value;
    const Deposits& deposits = block.exchange(members, &word, 1, "redux.sync", line);
    u32 lane = __builtin_ctz(deposits.lanes);
    u32 result = static_cast<u32>(deposits[lane][0]);
    while (++lane < kLanes) {
        if (deposits.lanes >> lane & 1) {
            result = combine(operation, result, static_cast<u32>(deposits[lane][0]));
        }
    }
    return result;
}

}  // namespace

u32 reduce(Reduction operation, u32 value, u32 members, int line) {
    return fold(operation, value, members, line);
}

u32 reduce_float(FloatReduction operation, u32 value, u32 members, int line) {
    if (operation.absolute) value &= 0x7fffffffu;
    return fold(operation, value, members, line);
}

}  // namespace ptx
