// The point-to-point kernels: between tensors and the mailbox of this process's job.
#include <algorithm>
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
using tensorflow::TensorShape;

class SendPostOp : public OpKernel {
 public:
  explicit SendPostOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  // Cheap, so that the executor runs it in place rather than behind the next segment.
  bool IsExpensive() override { return false; }

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK(context, FindJob(&job));
    const Timeline::Start start = attributes_.Begin();
    const Tensor& tensor = context->input(0);
    OP_REQUIRES(context,
                attributes_.partial_shape.IsCompatibleWith(tensor.shape()) &&
                    tensor.dims() <= Header::kMaxDims,
                absl::InvalidArgumentError(
                    "smp_tf: the tensor has not the shape that both ends agreed on; "
                    "shape=" +
                    tensor.shape().DebugString() +
                    " agreed=" + attributes_.partial_shape.DebugString() + ": " +
                    attributes_.route->label + " to rank " +
                    std::to_string(attributes_.route->peer)));
    Buffer payload = BufferOf(tensor);
    Done sent;
    if (start.run != 0) {
      sent = [start, bytes = payload.bytes](const Status& status) {
        if (status.ok()) GetTimeline().End(start, bytes);
      };
    }
    if (attributes_.is_static) {
      OP_REQUIRES_OK(context, ToAbsl(job->mailbox().PostSend(attributes_.route, nullptr,
                                                             std::move(payload),
                                                             std::move(sent))));
      return;
    }
    auto header = std::make_shared<Header>();
    header->dtype = tensor.dtype();
    header->dims = tensor.dims();
    for (int i = 0; i < tensor.dims(); ++i) header->sizes[i] = tensor.dim_size(i);
    const Buffer ahead = BufferOf(header);
    OP_REQUIRES_OK(
        context, ToAbsl(job->mailbox().PostSend(attributes_.route, &ahead,
                                                std::move(payload), std::move(sent))));
  }

 private:
  Attributes attributes_;
};

class RecvPostOp : public OpKernel {
 public:
  explicit RecvPostOp(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  bool IsExpensive() override { return false; }

  void Compute(OpKernelContext* context) override {
    const Timeline::Start start = attributes_.Begin();
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK(context, FindJob(&job));
    Buffer buffer;
    OP_REQUIRES_OK(context, Allocate(context, attributes_, &buffer));
    OP_REQUIRES_OK(context, ToAbsl(job->mailbox().PostRecv(
                                attributes_.route, attributes_.first_part(),
                                std::move(buffer), context->step_id())));
    GetTimeline().End(start, 0);
  }

 private:
  Attributes attributes_;
};

class SendFlushOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK_ASYNC(context, FindJob(&job), done);
    const auto waiter = std::make_shared<Waiter>(context, job);
    waiter->Wait(job->mailbox().Flush(),
                 [waiter, context, done = std::move(done)](const Status& status) {
                   waiter->Finish();
                   if (!status.ok()) context->SetStatus(ToAbsl(status));
                   done();
                 });
  }
};

class RecvWaitOp : public AsyncOpKernel {
 public:
  explicit RecvWaitOp(OpKernelConstruction* context) : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Read(context));
  }

  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const Timeline::Start start = attributes_.Begin();
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK_ASYNC(context, FindJob(&job), done);
    Posted posted = job->mailbox().Take(attributes_.route);
    if (!posted.ticket) {
      OP_REQUIRES_OK_ASYNC(context, PostNow(context, job.get(), &posted), done);
    }
    const auto waiter = std::make_shared<Waiter>(context, job);
    if (attributes_.is_static) {
      return GiveTensor(context, waiter, posted, start, std::move(done));
    }
    waiter->Wait(posted.ticket, [this, context, job, waiter, posted, start,
                                 done = std::move(done)](const Status& status) {
      Posted payload;
      absl::Status error = ToAbsl(status);
      if (error.ok()) error = PostPayload(context, job.get(), posted, &payload);
      if (error.ok()) return GiveTensor(context, waiter, payload, start, done);
      waiter->Finish();
      context->SetStatus(error);
      done();
    });
  }

 private:
  absl::Status PostNow(OpKernelContext* context, Job* job, Posted* posted) {
    Buffer buffer;
    TF_RETURN_IF_ERROR(Allocate(context, attributes_, &buffer));
    posted->owner = buffer.owner;
    posted->ticket = job->mailbox().Recv(attributes_.route, attributes_.first_part(),
                                         std::move(buffer));
    return absl::OkStatus();
  }

  // A header has come: receive what it announces.
  absl::Status PostPayload(OpKernelContext* context, Job* job, const Posted& announced,
                           Posted* payload) {
    const auto header = std::static_pointer_cast<Header>(announced.owner);
    TensorShape shape;
    const int dims = std::min<int>(header->dims, Header::kMaxDims);
    TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(
        absl::MakeConstSpan(header->sizes, std::max(dims, 0)), &shape));
    if (header->dtype != attributes_.dtype ||
        !attributes_.partial_shape.IsCompatibleWith(shape)) {
      return ToAbsl(
          {Code::kDataLoss,
           "the two ends disagree about a tensor; sent=" +
               tensorflow::DataTypeString(static_cast<DataType>(header->dtype)) +
               shape.DebugString() +
               " expected=" + tensorflow::DataTypeString(attributes_.dtype) +
               attributes_.partial_shape.DebugString() + ": " +
               announced.ticket->Describe()});
    }
    Tensor tensor;
    TF_RETURN_IF_ERROR(context->allocate_temp(attributes_.dtype, shape, &tensor));
    Buffer buffer = BufferOf(tensor);
    payload->owner = buffer.owner;
    payload->ticket = job->mailbox().RecvPayload(announced.ticket, std::move(buffer));
    return absl::OkStatus();
  }

  static void GiveTensor(OpKernelContext* context,
                         const std::shared_ptr<Waiter>& waiter, const Posted& posted,
                         const Timeline::Start& start, DoneCallback done) {
    waiter->Wait(posted.ticket, [context, waiter, owner = posted.owner, start,
                                 done = std::move(done)](const Status& status) {
      waiter->Finish();
      if (status.ok()) {
        const auto tensor = std::static_pointer_cast<Tensor>(owner);
        GetTimeline().End(start, tensor->TotalBytes());
        context->set_output(0, *tensor);
      } else {
        context->SetStatus(ToAbsl(status));
      }
      done();
    });
  }

  Attributes attributes_;
};

REGISTER_KERNEL_BUILDER(Name("SmpSendPost").Device(tensorflow::DEVICE_CPU), SendPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpSendFlush").Device(tensorflow::DEVICE_CPU),
                        SendFlushOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvPost").Device(tensorflow::DEVICE_CPU), RecvPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvWait").Device(tensorflow::DEVICE_CPU), RecvWaitOp);

}  // namespace
}  // namespace smp
