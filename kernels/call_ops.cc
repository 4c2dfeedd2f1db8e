// The ops that call segments and mark runs. No logic here: see call_kernels.cc.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"

namespace smp {

REGISTER_OP("SmpCall")
    .Input("args: Tin")
    .Output("output: Tout")
    .Attr("Tin: list(type) >= 0")
    .Attr("Tout: list(type) >= 0")
    .Attr("function: string")
    .Attr("config: string = ''")
    .Attr("config_proto: string = ''")
    .Attr("executor_type: string = ''")
    .Attr("program: int = -1")
    .Attr("event: int = -1")
    .SetIsStateful()
    .SetIsDistributedCommunication()
    .SetShapeFn(tensorflow::shape_inference::UnknownShape)
    .Doc(R"doc(
Calls a function as StatefulPartitionedCall does, with its attributes, inputs and outputs.

A graph with many of these calls is prepared as fast as one with few: no pass of
TensorFlow knows that it is a call, so that none looks into the function once for each.
Some passes do so for every attribute that is a function; hence the name.

function: Name of the function; an SmpRunEnd keeps it in the graph's library.
program: Number of the step's program in this process.
event: What the timeline calls it: the index of its instruction. -1: it is not recorded.
)doc");

REGISTER_OP("SmpRunBegin")
    .Attr("program: int >= 0")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Begins a run of a program; from here to SmpRunEnd, the timeline records.
)doc");

REGISTER_OP("SmpRunEnd")
    .Attr("program: int >= 0")
    .Attr("functions: list(func) >= 0 = []")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Ends the run of a program; what the timeline has of it is complete.

functions: Those that SmpCalls in the graph call, so that TensorFlow keeps them.
)doc");

}  // namespace smp
