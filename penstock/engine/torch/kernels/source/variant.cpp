// Compiled once per instruction set, with -DVARIANT=<name> -DLANE_BYTES=<width> and, where it exists, -DDOT_BF16.
#include "adapt.h"
#include "attention.h"
#include "draw.h"
#include "linear.h"
#include "quantised.h"
#include "rows.h"
#include "shorts.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

extern "C" {
extern const Kernels JOIN(penstock_, VARIANT) __attribute__((visibility("default")));
const Kernels JOIN(penstock_, VARIANT) = {
    VARIANT::write, VARIANT::scratch_bytes, VARIANT::attend, VARIANT::merge,
    VARIANT::norm,  VARIANT::rope,          VARIANT::gate,   VARIANT::adapt, VARIANT::linear_scratch, VARIANT::linear,
    VARIANT::draw,  VARIANT::ban,           VARIANT::quantise_rows, VARIANT::quantised_scratch,
    VARIANT::quantised,
    VARIANT::shorten_rows, VARIANT::shorts_scratch, VARIANT::shorts,
};
}
