// Sums over a group of ranks, of tensors in the memory of GPUs.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace smp {

REGISTER_OP("SmpSumPost")
    .Input("tensor: T")
    .Output("sum: T")
    .Output("handle: int64")
    .Attr("T: {half, bfloat16, float, double, int8, uint8, int64, uint64}")
    .Attr("group: int >= 0")
    .Attr("label: string = ''")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      context->set_output(0, context->input(0));
      context->set_output(1, context->Scalar());
      return absl::OkStatus();
    })
    .Doc(R"doc(
Begins to add up a tensor over a group of ranks, and returns.

Its ranks must begin their sums in the same order.

sum: Room for the sum, which SmpSumWait gives.
handle: For SmpSumWait, which every sum must be given to.
group: Number that the process knows the group by.
label: What errors call the sum.
)doc");

REGISTER_OP("SmpSumWait")
    .Input("sum: T")
    .Input("handle: int64")
    .Output("result: T")
    .Attr("T: type")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(tensorflow::shape_inference::UnchangedShape)
    .Doc(R"doc(
Gives a sum once it is there, waiting for it at most `timeout_s`, as counted from here.

The wait takes no thread, and nothing on the device waits for it: what does not read the
sum goes on meanwhile.
)doc");

}  // namespace smp
