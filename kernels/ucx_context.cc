#include "ucx_context.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

extern "C" {
// From <ucs/config/global_opts.h>, whose other contents are no stable interface.
ucs_status_t ucs_global_opts_set_value(const char* name, const char* value);
}

namespace smp {
namespace {

bool UserHasSet(const char* name) {
  return std::getenv((std::string("UCX_") + name).c_str()) != nullptr;
}

Status CheckVersion() {
  unsigned major = 0, minor = 0, patch = 0;
  ucp_get_version(&major, &minor, &patch);
  if (major == UCP_API_MAJOR && minor >= UCP_API_MINOR) return {};
  return {Code::kInvalid,
          "another UCX is loaded than the one built against; loaded=" +
              std::string(ucp_get_version_string()) + " built=" +
              std::to_string(UCP_API_MAJOR) + "." + std::to_string(UCP_API_MINOR) +
              "; take the other libucp.so.0 off LD_LIBRARY_PATH, or rebuild against "
              "it (SMP_UCX_HOME)"};
}

}  // namespace

Status UcxError(const std::string& what, ucs_status_t status) {
  return {Code::kUnavailable, what + "; status=" + ucs_status_string(status) +
                                  " (UCX " + ucp_get_version_string() + ")"};
}

Status OpenUcx(int size, const std::string& net_devices, double silence_seconds,
               ucp_context_h* context, ucp_worker_h* worker) {
  const Status version = CheckVersion();
  if (!version.ok()) return version;
  // A peer's death is reported by name by this library; what UCX prints about the same
  // event on each of its lanes would bury that.
  if (!UserHasSet("LOG_LEVEL")) ucs_global_opts_set_value("LOG_LEVEL", "fatal");

  ucp_config_t* config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return UcxError("cannot read the UCX configuration", status);
  const int silence_ms = std::max(1, static_cast<int>(1000 * silence_seconds));
  const std::pair<const char*, std::string> settings[] = {
      {"NET_DEVICES", net_devices},
      // sysv: its segments are open to the user's group, those of posix to the user
      // alone. cuda: this is for host memory, which needs no CUDA context.
      {"TLS", "^sysv,cuda"},
      // The system's own limit is a quarter of an hour.
      {"TCP_USER_TIMEOUT", std::to_string(silence_ms) + "ms"},
  };
  for (const auto& [name, value] : settings) {
    if (value.empty() || UserHasSet(name)) continue;
    status = ucp_config_modify(config, name, value.c_str());
    if (status != UCS_OK) {
      ucp_config_release(config);
      return UcxError(std::string("UCX refuses UCX_") + name + "=" + value, status);
    }
  }

  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
  params.features = UCP_FEATURE_TAG | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.estimated_num_eps = static_cast<size_t>(size);
  status = ucp_init(&params, config, context);
  ucp_config_release(config);
  if (status != UCS_OK) {
    return UcxError("UCX does not start; net_devices=" + net_devices, status);
  }

  ucp_worker_params_t worker_params = {};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  status = ucp_worker_create(*context, &worker_params, worker);
  if (status != UCS_OK) {
    ucp_cleanup(*context);
    *context = nullptr;
    return UcxError("cannot create a UCX worker; net_devices=" + net_devices, status);
  }
  return {};
}

std::string EndpointTransports(ucp_ep_h endpoint) {
  ucp_transport_entry_t entries[16];
  ucp_ep_attr_t attributes = {};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries;
  attributes.transports.num_entries = sizeof entries / sizeof entries[0];
  attributes.transports.entry_size = sizeof entries[0];
  if (ucp_ep_query(endpoint, &attributes) != UCS_OK) return "unknown";
  std::string text;
  for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
    if (i > 0) text += ' ';
    text += std::string(entries[i].transport_name) + "/" + entries[i].device_name;
  }
  return text;
}

bool IsSharedMemory(const std::string& transports) {
  for (const char* name : {"posix/", "sysv/", "xpmem/"}) {
    if (transports.find(name) != std::string::npos) return true;
  }
  return false;
}

}  // namespace smp
