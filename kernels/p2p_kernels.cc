// The point-to-point kernels: between tensors and the mailbox of this process's job.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "job.h"
#include "p2p_tensors.h"
#include "p2p_waiter.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace smp {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::OpKernel;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

class SendPostOp : public WithAttributes<OpKernel> {
 public:
  using WithAttributes::WithAttributes;

  void Compute(OpKernelContext* context) override {
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK(context, FindJob(&job));
    const Timeline::Start start = attributes_.Begin();
    const Tensor& tensor = context->input(0);
    OP_REQUIRES_OK(context, CheckShape(attributes_, tensor));
    Buffer payload = PayloadOf(tensor);
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
    const Buffer ahead = BufferOf(HeaderOf(tensor, payload.bytes));
    OP_REQUIRES_OK(
        context, ToAbsl(job->mailbox().PostSend(attributes_.route, &ahead,
                                                std::move(payload), std::move(sent))));
  }
};

class RecvPostOp : public WithAttributes<OpKernel> {
 public:
  using WithAttributes::WithAttributes;

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
};

class SendFlushOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    std::shared_ptr<Job> job;
    OP_REQUIRES_OK_ASYNC(context, FindJob(&job), done);
    std::vector<TicketPtr> flushes = {job->mailbox().Flush()};
    if (Job::Gpu* gpu = job->gpu()) flushes.push_back(gpu->mailbox.Flush());
    Wait(context, std::make_shared<Waiter>(context, job), std::move(flushes), done);
  }

 private:
  // All of them, and the first error: what one of them holds is not left behind.
  static void Wait(OpKernelContext* context, const std::shared_ptr<Waiter>& waiter,
                   std::vector<TicketPtr> flushes, DoneCallback done) {
    const TicketPtr first = flushes.front();
    flushes.erase(flushes.begin());
    waiter->Wait(first, [context, waiter, flushes = std::move(flushes),
                         done = std::move(done)](const Status& status) {
      if (!status.ok() && context->status().ok()) context->SetStatus(ToAbsl(status));
      if (!flushes.empty()) return Wait(context, waiter, flushes, done);
      waiter->Finish();
      done();
    });
  }
};

class RecvWaitOp : public WithAttributes<AsyncOpKernel> {
 public:
  using WithAttributes::WithAttributes;

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
    TF_RETURN_IF_ERROR(
        ShapeOf(attributes_, *header, announced.ticket->Describe(), &shape));
    Buffer buffer;
    TF_RETURN_IF_ERROR(MakeRoom(context, attributes_, *header, shape, &buffer));
    payload->owner = buffer.owner;
    payload->ticket = job->mailbox().RecvPayload(announced.ticket, std::move(buffer));
    return absl::OkStatus();
  }

  void GiveTensor(OpKernelContext* context, const std::shared_ptr<Waiter>& waiter,
                  const Posted& posted, const Timeline::Start& start,
                  DoneCallback done) const {
    waiter->Wait(posted.ticket, [dtype = attributes_.dtype, context, waiter,
                                 owner = posted.owner, start,
                                 done = std::move(done)](const Status& status) {
      waiter->Finish();
      Tensor tensor;
      absl::Status error = ToAbsl(status);
      if (error.ok()) error = TakeTensor(dtype, owner, &tensor);
      if (error.ok()) {
        GetTimeline().End(start, tensor.TotalBytes());
        context->set_output(0, tensor);
      } else {
        context->SetStatus(error);
      }
      done();
    });
  }
};

REGISTER_KERNEL_BUILDER(Name("SmpSendPost").Device(tensorflow::DEVICE_CPU), SendPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpSendFlush").Device(tensorflow::DEVICE_CPU),
                        SendFlushOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvPost").Device(tensorflow::DEVICE_CPU), RecvPostOp);
REGISTER_KERNEL_BUILDER(Name("SmpRecvWait").Device(tensorflow::DEVICE_CPU), RecvWaitOp);

}  // namespace
}  // namespace smp
