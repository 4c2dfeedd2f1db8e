// The kernels of sums over a group of ranks, over NCCL.
#include <memory>
#include <string>
#include <utility>

#include "job.h"
#include "p2p_tensors.h"
#include "p2p_waiter.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace smp {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::DataType;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;

int NcclTypeOf(DataType type) {
  switch (type) {
    case tensorflow::DT_HALF:
      return kNcclFloat16;
    case tensorflow::DT_BFLOAT16:
      return kNcclBfloat16;
    case tensorflow::DT_FLOAT:
      return kNcclFloat32;
    case tensorflow::DT_DOUBLE:
      return kNcclFloat64;
    case tensorflow::DT_INT8:
      return kNcclInt8;
    case tensorflow::DT_UINT8:
      return kNcclUint8;
    case tensorflow::DT_INT64:
      return kNcclInt64;
    case tensorflow::DT_UINT64:
      return kNcclUint64;
    default:
      return -1;  // the operation allows none of them
  }
}

class GpuSumPostOp : public OpKernel {
 public:
  explicit GpuSumPostOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("group", &group_));
    OP_REQUIRES_OK(context, context->GetAttr("label", &label_));
  }

  bool IsExpensive() override { return false; }

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<Job> job;
    Job::Gpu* gpu = nullptr;
    OP_REQUIRES_OK(context, FindGpu(&job, &gpu));
    // The message keeps both.
    const auto owner = std::make_shared<std::pair<Tensor, Tensor>>();
    owner->first = context->input(0);
    Tensor* sum = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, owner->first.shape(), &sum));
    owner->second = *sum;
    Buffer buffer = BufferOf(owner->first);
    buffer.owner = owner;
    Tensor* handle = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(1, {}, &handle));
    handle->scalar<int64_t>()() = gpu->mailbox.PostSum(
        group_, label_, std::move(buffer),
        {BufferOf(*sum).data, NcclTypeOf(owner->first.dtype())}, StreamOf(context));
  }

 private:
  int group_ = 0;
  std::string label_;
};

class GpuSumWaitOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<Job> job;
    Job::Gpu* gpu = nullptr;
    OP_REQUIRES_OK_ASYNC(context, FindGpu(&job, &gpu), done);
    const TicketPtr ticket =
        gpu->mailbox.TakeSum(context->input(1).scalar<int64_t>()());
    OP_REQUIRES_ASYNC(
        context, ticket != nullptr,
        absl::InvalidArgumentError("smp_tf: there is no such sum, or it was taken"),
        done);
    const auto waiter = std::make_shared<Waiter>(context, job);
    auto over = [context, waiter, done = std::move(done)](const Status& status) {
      waiter->Finish();
      if (status.ok()) {
        context->set_output(0, context->input(0));
      } else {
        context->SetStatus(ToAbsl(status));
      }
      done();
    };
    waiter->Begin(ticket, [&] { gpu->mailbox.Wait(ticket, std::move(over)); });
  }
};

REGISTER_KERNEL_BUILDER(
    Name("SmpSumPost").Device(tensorflow::DEVICE_GPU).HostMemory("handle"),
    GpuSumPostOp);
REGISTER_KERNEL_BUILDER(
    Name("SmpSumWait").Device(tensorflow::DEVICE_GPU).HostMemory("handle"),
    GpuSumWaitOp);

}  // namespace
}  // namespace smp
