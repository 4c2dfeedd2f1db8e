// How UCX is set up: which devices, which transports, and how loud.
#ifndef SMP_TF_KERNELS_UCX_CONTEXT_H_
#define SMP_TF_KERNELS_UCX_CONTEXT_H_

#include <ucp/api/ucp.h>

#include <string>

#include "transport.h"

namespace smp {

// "what; status=Input/output error (UCX 1.22.0)"
Status UcxError(const std::string& what, ucs_status_t status);

// Opens a context for `size` ranks and one worker that may be called from any one
// thread at a time. `net_devices`: UCX_NET_DEVICES ("lo"), or empty for all.
// `silence_seconds`: how long a peer's host may leave messages over TCP without an
// acknowledgement. A UCX_* variable that the user has set wins over what is chosen.
Status OpenUcx(int size, const std::string& net_devices, double silence_seconds,
               ucp_context_h* context, ucp_worker_h* worker);

// "posix/memory cma/memory tcp/lo": what the endpoint sends through.
std::string EndpointTransports(ucp_ep_h endpoint);

// Whether any of those is shared memory.
bool IsSharedMemory(const std::string& transports);

}  // namespace smp

#endif  // SMP_TF_KERNELS_UCX_CONTEXT_H_
