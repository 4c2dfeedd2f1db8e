#include "gpu_rank.h"

#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

namespace smp::testing {
namespace {

constexpr auto kPatience = std::chrono::seconds(30);

std::string PathOf(const char* library) {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  CHECK(length > 0);
  const std::string own(path, static_cast<size_t>(length));
  return own.substr(0, own.rfind('/') + 1) + library;
}

template <typename Function>
void Find(const std::string& library, const char* name, Function* function) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  CHECK(handle != nullptr);
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  CHECK(*function != nullptr);
}

}  // namespace

// --- libraries

FakeLibraries::FakeLibraries() {
  const std::string cuda_file = PathOf("libfake_cuda.so");
  const std::string nccl_file = PathOf("libfake_nccl.so");
  cuda = LoadCuda(cuda_file.c_str());
  nccl = LoadNccl(nccl_file.c_str());
  CHECK_EQ(cuda.why_not, "");
  CHECK_EQ(nccl.why_not, "");
  Find(cuda_file, "cuLaunchHostFunc", &launch);
  Find(cuda_file, "fake_cuda_counts", &cuda_counts_);
  Find(nccl_file, "fake_nccl_counts", &nccl_counts_);
  Find(nccl_file, "fake_nccl_inject", &inject);
  Find(nccl_file, "fake_nccl_refuse", &refuse);
}

FakeCudaCounts FakeLibraries::CudaCounts() const {
  FakeCudaCounts counts;
  cuda_counts_(&counts);
  return counts;
}

FakeNcclCounts FakeLibraries::NcclCounts() const {
  FakeNcclCounts counts;
  nccl_counts_(&counts);
  return counts;
}

const FakeLibraries& Fakes() {
  static const auto* const fakes = new FakeLibraries;
  return *fakes;
}

// --- outcomes, memory, streams

Done Outcome::Handler() {
  return [state = state_](const Status& status) {
    std::lock_guard<std::mutex> lock(state->mutex);
    CHECK_EQ(++state->calls, 1);
    state->status = status;
    state->changed.notify_all();
  };
}

bool Outcome::IsOver() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->calls > 0;
}

Status Outcome::Await() const {
  std::unique_lock<std::mutex> lock(state_->mutex);
  CHECK(
      state_->changed.wait_for(lock, kPatience, [this] { return state_->calls > 0; }));
  return state_->status;
}

std::string Memory::Pattern(size_t bytes, int seed) {
  std::string text(bytes, static_cast<char>(seed));
  for (size_t i = 0; i < bytes; i += 509) text[i] = static_cast<char>(seed + i / 509);
  return text;
}

Memory::Memory(size_t bytes, int seed) {
  auto owner = std::make_shared<std::string>(Pattern(bytes, seed));
  buffer_ = {owner->data(), bytes, owner};
  watch_ = owner;
}

std::string Memory::Text() const {
  return std::string(static_cast<const char*>(buffer_.data), buffer_.bytes);
}

void PutOnStream(CudaStream stream, std::function<void()> call) {
  auto argument = std::make_unique<std::function<void()>>(std::move(call));
  const auto run = [](void* pointer) {
    const std::unique_ptr<std::function<void()>> own(
        static_cast<std::function<void()>*>(pointer));
    (*own)();
  };
  CHECK_EQ(Fakes().launch(stream, run, argument.release()), kCudaSuccess);
}

void Synchronize(CudaStream stream) {
  Outcome reached;
  PutOnStream(stream, [told = reached.Handler()] { told({}); });
  reached.Await();
}

class Gate::Latch {
 public:
  void Open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

Gate::Gate(CudaStream stream) : latch_(std::make_shared<Latch>()) {
  PutOnStream(stream, [latch = latch_] { latch->Wait(); });
}

void Gate::Open() { latch_->Open(); }

// --- ranks

GpuRank::GpuRank(Process& process)
    : process_(process), device_(std::make_shared<GpuDevice>(&Fakes().cuda)) {
  CHECK_EQ(device_->Open(0).text, "");
  CHECK_EQ(device_->MakeStream(&compute_).text, "");
  const auto failed = [this](const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    failures_.push_back(why);
  };
  transport_ =
      std::make_unique<NcclTransport>(process_.size, device_, &Fakes().nccl, failed);
}

GpuRank::~GpuRank() {
  transport_->Close(0);
  transport_.reset();
  device_->FreeStream(compute_);
  CHECK(Eventually([this] { return device_.use_count() == 1; }));
  device_.reset();
  const FakeCudaCounts cuda = Fakes().CudaCounts();
  CHECK_EQ(cuda.contexts_pushed, 0);
  CHECK_EQ(cuda.streams, 0);
  CHECK_EQ(cuda.events, 0);
  CHECK_EQ(cuda.allocations, 0);
  CHECK_EQ(cuda.mistakes, 0);
  const FakeNcclCounts nccl = Fakes().NcclCounts();
  CHECK_EQ(nccl.communicators, 0);
  CHECK_EQ(nccl.mismatches, 0);
  CHECK_EQ(nccl.mistakes, 0);
}

void GpuRank::Connect() {
  for (int source = 0; source < process_.size; ++source) {
    for (int target = 0; target < process_.size; ++target) {
      if (source == target) continue;
      std::string id;
      if (process_.rank == source) {
        CHECK_EQ(NcclTransport::MakeId(Fakes().nccl, &id).text, "");
      }
      const auto ids = process_.Exchange(id);
      if (process_.rank == source) {
        CHECK_EQ(transport_->Connect(target, Way::kSend, id, kTestSeconds).text, "");
      }
      if (process_.rank == target) {
        CHECK_EQ(
            transport_->Connect(source, Way::kRecv, ids[source], kTestSeconds).text,
            "");
      }
    }
  }
}

Status GpuRank::ConnectGroup(const std::vector<int>& ranks, int* group) {
  std::string id;
  if (process_.rank == ranks.front()) {
    CHECK_EQ(NcclTransport::MakeId(Fakes().nccl, &id).text, "");
  }
  const auto ids = process_.Exchange(id);
  if (id.empty()) id = ids[ranks.front()];
  return transport_->ConnectGroup(ranks, process_.rank, id, kTestSeconds, group);
}

Message GpuRank::To(int peer, Buffer buffer, bool more) const {
  Message message;
  message.id = NextId();
  message.peer = peer;
  message.buffer = std::move(buffer);
  message.stream = compute_;
  message.more = more;
  return message;
}

Outcome GpuRank::Send(int peer, Buffer buffer, bool more) {
  Outcome outcome;
  transport_->Send(To(peer, std::move(buffer), more), outcome.Handler());
  return outcome;
}

Outcome GpuRank::Recv(int peer, Buffer buffer, bool more) {
  Outcome outcome;
  transport_->Recv(To(peer, std::move(buffer), more), outcome.Handler());
  return outcome;
}

Outcome GpuRank::Reserve(int peer, uint64_t* id) {
  Outcome outcome;
  Message message = To(peer, {});
  *id = message.id;
  transport_->Reserve(std::move(message), outcome.Handler());
  return outcome;
}

bool GpuRank::Eventually(const std::function<bool()>& ready) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

std::vector<std::string> GpuRank::failures() {
  std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

}  // namespace smp::testing
