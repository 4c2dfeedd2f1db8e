// The link that is late, of slow_link.cc: late by so much, in order, one behind
// another.
#include "testing.h"

namespace smp::testing {
namespace {

constexpr double kSeconds = 0.2;

void MessagesAreLateTogether(Rank& rank) {
  std::unique_ptr<Job> job;
  CHECK_EQ(rank.Join(&job).text, "");
  rank.Meet();
  const double start = Now();
  if (rank.rank == 0) {
    for (uint32_t i = 0; i < 5; ++i) rank.Send(*job, 1, 7, "abc" + std::to_string(i));
    CHECK(Now() - start < kSeconds / 2);  // the sender does not wait
    CHECK_EQ(Await(*job, job->mailbox().Flush()).text, "");
    CHECK(Now() - start >= kSeconds);
  } else {
    for (uint32_t i = 0; i < 5; ++i) {
      CHECK_EQ(rank.Recv(*job, 0, 7, 4), "abc" + std::to_string(i));
    }
    CHECK(Now() - start > 0.9 * kSeconds && Now() - start < 2 * kSeconds);
  }
  CHECK_EQ(job->Close(5).text, "");
}

void ASendCanBeCancelled(Rank& rank) {
  std::unique_ptr<Job> job;
  CHECK_EQ(rank.Join(&job).text, "");
  if (rank.rank == 0) {
    auto route = std::make_shared<Route>(Route{1, 7, "text"});
    const TicketPtr ticket = job->mailbox().Send(route, TextBuffer("abcd"), false);
    job->mailbox().Cancel(ticket, {Code::kCancelled, "enough"});
    CHECK(Await(*job, ticket).code == Code::kCancelled);
  }
  rank.Meet();
  CHECK_EQ(job->Close(5).text, "");
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  setenv("SMP_TEST_LINK_MS", "200", 1);
  RunRanks("messages are late together", 2, MessagesAreLateTogether);
  RunRanks("a send that has not left can be cancelled", 2, ASendCanBeCancelled);
}
