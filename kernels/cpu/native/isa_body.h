/* All operators, compiled for the instruction set of the isa_*.c that includes this. OV_AVX512, OV_AMX and the
 * compiler's __AVXVNNI__ say what it has beyond AVX2. The names of operators' functions are the same in all of them, because everything is static. */
#include "octavo_cpu.h"
#include "vec.h"

#include "linear_impl.h"
#include "embed_impl.h"
#include "elementwise_impl.h"
#include "rope_impl.h"
#include "attention_impl.h"
#include "sampling_impl.h"
#include "moe_impl.h"

extern const OvKernels OV_ISA_KERNELS;

const OvKernels OV_ISA_KERNELS = {
    .name = OV_ISA_NAME,
    .phases =
        {
            [OV_EMBED] = {embed_rows},
            [OV_LINEAR] = {linear_arrange, linear_multiply},
            [OV_RMS_NORM] = {ov_rms_norm},
            [OV_ADD_RMS_NORM] = {ov_add_rms_norm},
            [OV_ADD] = {ov_add},
            [OV_GATED] = {ov_gated},
            [OV_SELECT_ROWS] = {ov_select_rows},
            [OV_ROPE_WRITE] = {ov_rope_write},
            [OV_ATTENTION] = {ov_attention, ov_attention_merge},
            [OV_DRAW] = {ov_draw_phase},
            [OV_CAP] = {ov_cap},
            [OV_MOE] = {moe_route_tokens, moe_group, moe_gather, moe_arrange_gate_up, moe_multiply_gate_up, moe_gate,
                        moe_arrange_down, moe_multiply_down, moe_sum},
        },
    .plans =
        {
            [OV_LINEAR] = linear_plan,
            [OV_ATTENTION] = ov_attention_plan,
            [OV_MOE] = moe_plan,
        },
#ifdef OV_AMX
    .thread_enter = tiles_enter,
    .thread_leave = tiles_leave,
#endif
    .scratch_bytes = 1 << 16,
};
