// What a translated kernel includes.
#pragma once

#include "async_copy.h"
#include "bits.h"
#include "block.h"
#include "matrix.h"
#include "memory.h"
#include "values.h"
#include "warp.h"
