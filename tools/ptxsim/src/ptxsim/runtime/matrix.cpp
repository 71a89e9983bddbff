#include "matrix.h"

#include <algorithm>

#include "block.h"
#include "memory.h"

namespace ptx {

namespace {

constexpr u32 kWholeWarp = ~0u;
constexpr int kRows = 8;  // of the matrices that ldmatrix moves: each lane names one row

// Everybody learns where all the rows are.
void gather_rows(u32* rows, u64 offset, const char* at, int line) {
    const u64 word = static_cast<u32>(offset);
    const Deposits& deposits = block.exchange(kWholeWarp, &word, 1, at, line);
    for (u32 l = 0; l < kLanes; l++) rows[l] = static_cast<u32>(deposits[l][0]);
}

}  // namespace

void load_matrices(u32* destination, int count, bool transposed, u64 offset, int line) {
    u32 rows[kLanes];
    gather_rows(rows, offset, "ldmatrix", line);
    const u32 row = block.lane() / 4, pair = block.lane() % 4;
    for (int m = 0; m < count; m++) {
        const u32* matrix = rows + kRows * m;
        if (!transposed) {
            destination[m] = load_shared<u32>(matrix[row] + 4 * pair, line);
        } else {
            const u16 low = load_shared<u16>(matrix[2 * pair] + 2 * row, line);
            const u16 high = load_shared<u16>(matrix[2 * pair + 1] + 2 * row, line);
            destination[m] = pack(low, high);
        }
    }
}

void store_matrices(const u32* source, int count, bool transposed, u64 offset, int line) {
    u32 rows[kLanes];
    gather_rows(rows, offset, "stmatrix", line);
    const u32 row = block.lane() / 4, pair = block.lane() % 4;
    for (int m = 0; m < count; m++) {
        const u32* matrix = rows + kRows * m;
        if (!transposed) {
            store_shared<u32>(matrix[row] + 4 * pair, source[m], line);
        } else {
            store_shared<u16>(matrix[2 * pair] + 2 * row, static_cast<u16>(source[m]), line);
            store_shared<u16>(matrix[2 * pair + 1] + 2 * row, static_cast<u16>(source[m] >> 16),
                              line);
        }
    }
}

namespace {

// How many elements share a register.
constexpr int elements_per_word(Element element) {
    if (element == Element::tf32) return 1;
    return element == Element::f16 || element == Element::bf16 ? 2 : 4;
}

template <Element element>
double element_of(u64 word, int position) {
    switch (element) {
        case Element::f16: return f16(word >> (16 * position));
        case Element::bf16: return bf16(word >> (16 * position) & 0xffff);
        case Element::tf32: return f32(word & ~0x1fffu);  // the low 13 bits are not wired
        case Element::s8: return static_cast<s8>(word >> (8 * position));
        default: return static_cast<u8>(word >> (8 * position));
    }
}

constexpr int kMostDepth = 64;
using Line = double[kMostDepth];  // a row of `a`, or a column of `b`

// The four lanes from `lane` on hold the line, in every `step`th of their registers from `first`
// on: each lane has `per_word` neighbours in k, and its next register continues 4 * per_word
// further (PTX manual, "Matrix Fragments for mma.m16n8k*").
template <Element element>
void read_line(Line line, int k, const Deposits& deposits, int lane, int first, int step) {
    constexpr int per_word = elements_per_word(element), stride = 4 * per_word;
    for (int i = 0; i < k; i++) {
        const u64 word = deposits[lane + i % stride / per_word][first + i / stride * step];
        line[i] = element_of<element>(word, i % per_word);
    }
}

using ReadLine = void (*)(Line, int, const Deposits&, int, int, int);
ReadLine reader_of(Element element) {
    switch (element) {
        case Element::f16: return read_line<Element::f16>;
        case Element::bf16: return read_line<Element::bf16>;
        case Element::tf32: return read_line<Element::tf32>;
        case Element::s8: return read_line<Element::s8>;
        default: return read_line<Element::u8>;
    }
}

u32 accumulate(Accumulator accumulator, double product, u32 addend) {
    switch (accumulator) {
        case Accumulator::f32: return to_f32(static_cast<float>(product + f32(addend)));
        case Accumulator::f16: return to_f16(static_cast<float>(product + f16(addend)));
        case Accumulator::s32: return addend + static_cast<u32>(static_cast<s64>(product));
        default: {
            const double sum = product + static_cast<s32>(addend);
            return static_cast<u32>(
                static_cast<s32>(std::max(-2147483648.0, std::min(2147483647.0, sum))));
        }
    }
}

}  // namespace

void multiply_matrices(int k, Element element, Accumulator accumulator, u32* d, Fragment a,
                       Fragment b, Fragment c, int line) {
    u64 words[kExchangeWords];
    std::copy(a.words, a.words + a.count, words);
    std::copy(b.words, b.words + b.count, words + a.count);
    const Deposits& deposits =
        block.exchange(kWholeWarp, words, a.count + b.count, "mma.sync", line);
    // A lane's part of the result: two rows by two columns.
    const int group = block.lane() / 4, pair = block.lane() % 4;
    Line rows[2], columns[2];
    const ReadLine read = reader_of(element);
    for (int i = 0; i < 2; i++) {
        read(rows[i], k, deposits, 4 * group, i, 2);  // row `group`, and row `group + 8`
        read(columns[i], k, deposits, 4 * (2 * pair + i), a.count, 1);
    }
    for (int e = 0; e < 4; e++) {
        double product = 0;
        for (int i = 0; i < k; i++) product += rows[e / 2][i] * columns[e % 2][i];
        if (accumulator != Accumulator::f16) {
            d[e] = accumulate(accumulator, product, c.words[e]);
        } else {  // two elements a register
            const int shift = 16 * (e % 2);
            const u32 sum = accumulate(accumulator, product, c.words[e / 2] >> shift & 0xffff);
            d[e / 2] = (e % 2 ? d[e / 2] : 0) | sum << shift;
        }
    }
}

}  // namespace ptx
