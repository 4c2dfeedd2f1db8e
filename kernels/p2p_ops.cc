// The point-to-point ops, as graphs see them. No logic here: see p2p_kernels.cc.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace smp {
namespace {

using tensorflow::PartialTensorShape;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status ShapeFromAttr(InferenceContext* context) {
  PartialTensorShape shape;
  TF_RETURN_IF_ERROR(context->GetAttr("shape", &shape));
  ShapeHandle handle;
  TF_RETURN_IF_ERROR(context->MakeShapeFromPartialTensorShape(shape, &handle));
  context->set_output(0, handle);
  return absl::OkStatus();
}

}  // namespace

// Stateful, so that no pass merges, folds or drops them; distributed communication, so
// that TensorFlow leaves their error codes as they are.

REGISTER_OP("SmpSendPost")
    .Input("tensor: T")
    .Attr("T: type")
    .Attr("peer: int >= 0")
    .Attr("channel: int >= 0")
    .Attr("shape: shape")
    .Attr("label: string = ''")
    .Attr("more: bool = false")
    .Attr("program: int = -1")
    .Attr("event: int = -1")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Queues a tensor for another rank and returns; the tensor lives until it has left.

peer: World rank that receives it.
channel: Route between the two ranks, below 2^28; both ends use the same number, and the
  n-th send of a channel meets its n-th receive.
shape: What both ends know of the shape. When it is not fully defined, the true shape
  travels ahead of the data.
label: What errors call the tensor.
more: Whether another tensor for the same rank follows at once. Those of a GPU then travel
  together.
program, event: As in SmpCall. The event is over when the tensor has left.
)doc");

REGISTER_OP("SmpSendFlush")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Waits until every tensor queued by SmpSendPost so far has left, or fails by name. Also
for tensors that arrive in the memory of a GPU, for which SmpRecvWait does not wait.
)doc");

REGISTER_OP("SmpRecvPost")
    .Attr("T: type")
    .Attr("peer: int >= 0")
    .Attr("channel: int >= 0")
    .Attr("shape: shape")
    .Attr("label: string = ''")
    .Attr("more: bool = false")
    .Attr("program: int = -1")
    .Attr("event: int = -1")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Makes room for a tensor, so that it may arrive before SmpRecvWait asks for it.

The arguments are those of the SmpRecvWait that belongs to it.
)doc");

REGISTER_OP("SmpRecvWait")
    .Output("tensor: T")
    .Attr("T: type")
    .Attr("peer: int >= 0")
    .Attr("channel: int >= 0")
    .Attr("shape: shape")
    .Attr("label: string = ''")
    .Attr("more: bool = false")
    .Attr("program: int = -1")
    .Attr("event: int = -1")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(ShapeFromAttr)
    .Doc(R"doc(
Gives the tensor that another rank has sent on a channel, waiting for it at most
`timeout_s`, as counted from here.

Takes the oldest receive that SmpRecvPost has posted on the channel; posts one itself
when there is none. On a GPU it lets the stream of computations wait and returns;
SmpSendFlush tells whether the tensor came.

peer: World rank that sends it.
channel, shape, label: As in SmpSendPost.
program, event: As in SmpCall. The event is the wait.
)doc");

}  // namespace smp
