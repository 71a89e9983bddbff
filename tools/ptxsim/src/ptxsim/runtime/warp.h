// Instructions in which the lanes of a warp exchange values.
#pragma once

#include "launch.h"

namespace ptx {

enum class Shuffle { up, down, butterfly, index };

struct Shuffled {
    u32 value;
    bool in_range;
};
Shuffled shuffle(Shuffle mode, u32 value, u32 lane, u32 clamp, u32 members, int line);

enum class Vote { ballot, all, any, uniform };
u32 vote(Vote mode, bool predicate, u32 members, int line);

enum class Reduction { add, min_unsigned, max_unsigned, min_signed, max_signed, and_, or_, xor_ };
u32 reduce(Reduction operation, u32 value, u32 members, int line);

struct FloatReduction {
    bool maximum, absolute, keep_nan;
};
u32 reduce_float(FloatReduction operation, u32 value, u32 members, int line);

}  // namespace ptx
