// Every kernel there is, for the fatbin that is built where nvcc is installed.
#include "pair_kernels.h"

#define UNILOGIT_PAIR(LOGITS, OUT)                                                                 \
  LOG_ODDS_GRADIENT(LOGITS, OUT, plain)                                                            \
  LOG_ODDS_GRADIENT(LOGITS, OUT, capped)                                                           \
  RUNNER_UP_GRADIENT(LOGITS, OUT, plain)                                                           \
  RUNNER_UP_GRADIENT(LOGITS, OUT, capped)                                                          \
  GENERAL_GRADIENT(LOGITS, OUT, plain)                                                             \
  GENERAL_GRADIENT(LOGITS, OUT, capped)                                                            \
  LOG_ODDS_SWEEP(LOGITS, OUT, plain)                                                               \
  LOG_ODDS_SWEEP(LOGITS, OUT, capped)

#define UNILOGIT_TYPE(TYPE)                                                                        \
  LOG_ODDS_UPDATE(TYPE, plain)                                                                     \
  LOG_ODDS_UPDATE(TYPE, capped)                                                                    \
  RUNNER_UP_UPDATE(TYPE, plain)                                                                    \
  RUNNER_UP_UPDATE(TYPE, capped)                                                                   \
  GENERAL_UPDATE(TYPE, plain)                                                                      \
  GENERAL_UPDATE(TYPE, capped)                                                                     \
  UNILOGIT_PAIR(TYPE, Float32)                                                                     \
  UNILOGIT_PAIR(TYPE, Bfloat16)                                                                    \
  UNILOGIT_PAIR(TYPE, Float16)                                                                     \
  SCALE(TYPE)

MERGE_PARTS()
RUNNER_UP_MERGE()
GENERAL_MERGE()
DIVERGENCE_UPDATE()
MERGE_PAIRS()
DIVERGENCE_GRADIENT()
UNILOGIT_TYPE(Float32)
UNILOGIT_TYPE(Bfloat16)
UNILOGIT_TYPE(Float16)
