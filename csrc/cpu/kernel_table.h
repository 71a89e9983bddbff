// All kernels of one instruction set. Included last, inside the instruction set's namespace.
#pragma once

template <class T>
int64_t stage_block(const void* data, int64_t stride, int64_t count,
                    const UnilogitTransform& transform, Label& label, float* z, float* cap_slope) {
  return stage(static_cast<const T*>(data), stride, count, transform, label, z, cap_slope);
}

constexpr Kernels make_kernels(const char* name, const MomentKernels& moments) {
  return {
      name,
      &moments,
      {block_part<float>, block_part<bfloat16>, block_part<float16>},
      {block_exponentials<float>, block_exponentials<bfloat16>, block_exponentials<float16>},
      {write_block<float>, write_block<bfloat16>, write_block<float16>},
      {{write_block_and_part<float, float>, write_block_and_part<float, bfloat16>,
        write_block_and_part<float, float16>},
       {write_block_and_part<bfloat16, float>, write_block_and_part<bfloat16, bfloat16>,
        write_block_and_part<bfloat16, float16>},
       {write_block_and_part<float16, float>, write_block_and_part<float16, bfloat16>,
        write_block_and_part<float16, float16>}},
      merge_parts,
      finish_row,
      {stage_block<float>, stage_block<bfloat16>, stage_block<float16>},
      {{pair_part<float, float>, pair_part<float, bfloat16>, pair_part<float, float16>},
       {pair_part<bfloat16, float>, pair_part<bfloat16, bfloat16>, pair_part<bfloat16, float16>},
       {pair_part<float16, float>, pair_part<float16, bfloat16>, pair_part<float16, float16>}},
      {{pair_gradient<float, float>, pair_gradient<float, bfloat16>, pair_gradient<float, float16>},
       {pair_gradient<bfloat16, float>, pair_gradient<bfloat16, bfloat16>,
        pair_gradient<bfloat16, float16>},
       {pair_gradient<float16, float>, pair_gradient<float16, bfloat16>,
        pair_gradient<float16, float16>}},
      merge_pairs,
      stream_copy,
      exp_array,
      tanh_array};
}
