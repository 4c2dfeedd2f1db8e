// The kernels that call segments and mark runs.
//
// A call is done by TensorFlow's own kernel of StatefulPartitionedCall, one for all
// calls of a function in a graph: it instantiates the function, with all of its
// optimisations, once, when the first call needs it.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "tensorflow/core/framework/function.h"
#include "tensorflow/core/framework/node_def_builder.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "timeline.h"

namespace smp {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::FunctionLibraryRuntime;
using tensorflow::NodeProperties;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;

using SharedKernel = std::shared_ptr<OpKernel>;

// The kernels that are alive, by the library of the graph (TensorFlow makes one for
// each function that it runs) and by what they call. Never destroyed, like TensorFlow's
// own.
struct Shared {
  using Key = std::pair<FunctionLibraryRuntime*, std::string>;
  std::mutex mutex;
  std::map<Key, std::weak_ptr<OpKernel>> kernels;
};
Shared& GetShared() {
  static auto* shared = new Shared;
  return *shared;
}

// StatefulPartitionedCall, with the attributes and inputs of the call.
absl::Status MakeKernel(OpKernelConstruction* context, const std::string& function,
                        SharedKernel* kernel) {
  tensorflow::NodeDef node = context->def();
  node.set_op("StatefulPartitionedCall");
  for (const char* ours : {"function", "program", "event"}) {
    node.mutable_attr()->erase(ours);
  }
  (*node.mutable_attr())["f"].mutable_func()->set_name(function);
  std::shared_ptr<const NodeProperties> properties;
  TF_RETURN_IF_ERROR(NodeProperties::CreateFromNodeDef(
      std::move(node), tensorflow::OpRegistry::Global(), &properties));
  tensorflow::DeviceBase* device = context->device();
  OpKernel* made = nullptr;
  TF_RETURN_IF_ERROR(tensorflow::CreateOpKernel(
      context->device_type(), device, device->GetAllocator({}),
      context->function_library(), context->resource_manager(), properties,
      context->graph_def_version(), &made));
  kernel->reset(made);
  if (made->AsAsync() != nullptr) return absl::OkStatus();
  return absl::InternalError("smp_tf: StatefulPartitionedCall is not asynchronous");
}

absl::Status FindOrMakeKernel(OpKernelConstruction* context, SharedKernel* kernel) {
  std::string function, config, executor;
  TF_RETURN_IF_ERROR(context->GetAttr("function", &function));
  TF_RETURN_IF_ERROR(context->GetAttr("config_proto", &config));
  TF_RETURN_IF_ERROR(context->GetAttr("executor_type", &executor));
  FunctionLibraryRuntime* library = context->function_library();
  if (library == nullptr) {
    return absl::InternalError("smp_tf: no function library is provided");
  }
  Shared& shared = GetShared();
  const Shared::Key key(library, function + '\0' + executor + '\0' + config);
  std::lock_guard<std::mutex> lock(shared.mutex);
  const auto found = shared.kernels.find(key);
  if (found != shared.kernels.end()) *kernel = found->second.lock();
  if (*kernel) return absl::OkStatus();
  SharedKernel made;
  TF_RETURN_IF_ERROR(MakeKernel(context, function, &made));
  for (auto old = shared.kernels.begin(); old != shared.kernels.end();) {
    old = old->second.expired() ? shared.kernels.erase(old) : std::next(old);
  }
  shared.kernels[key] = made;
  *kernel = std::move(made);
  return absl::OkStatus();
}

class CallOp : public AsyncOpKernel {
 public:
  explicit CallOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("program", &program_));
    OP_REQUIRES_OK(context, context->GetAttr("event", &event_));
    OP_REQUIRES_OK(context, FindOrMakeKernel(context, &kernel_));
  }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const Timeline::Start start = GetTimeline().Begin(program_, event_);
    if (start.run != 0) {
      done = [start, done = std::move(done)] {
        GetTimeline().End(start, 0);
        done();
      };
    }
    kernel_->AsAsync()->ComputeAsync(context, std::move(done));
  }

 private:
  int program_ = -1;
  int event_ = -1;
  SharedKernel kernel_;
};

template <void (Timeline::*mark)(int32_t)>
class MarkOp : public OpKernel {
 public:
  explicit MarkOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("program", &program_));
  }

  // Cheap, so that the executor runs it in place.
  bool IsExpensive() override { return false; }

  void Compute(OpKernelContext*) override { (GetTimeline().*mark)(program_); }

 private:
  int program_ = -1;
};

REGISTER_KERNEL_BUILDER(Name("SmpCall").Device(tensorflow::DEVICE_CPU), CallOp);
REGISTER_KERNEL_BUILDER(Name("SmpRunBegin").Device(tensorflow::DEVICE_CPU),
                        MarkOp<&Timeline::BeginRun>);
REGISTER_KERNEL_BUILDER(Name("SmpRunEnd").Device(tensorflow::DEVICE_CPU),
                        MarkOp<&Timeline::EndRun>);

}  // namespace
}  // namespace smp
