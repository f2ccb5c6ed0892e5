// Tells a service manager how far the process is, in systemd's protocol (sd_notify(3)): one
// datagram to the socket that $NOTIFY_SOCKET names. Any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_NOTIFY_H_
#define KVSERVICE_KVSERVICE_SERVER_NOTIFY_H_

#include <string>

namespace kvservice {

// "READY=1", "STOPPING=1", ... Nothing happens when there is no manager to tell; one that cannot be
// told is no reason to fail either.
void NotifyManager(const std::string& state);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_NOTIFY_H_
