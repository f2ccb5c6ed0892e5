// What a failed call tells a program. Every error of this library is an absl::Status whose payloads
// are the google.rpc details that the server sent (or that the library made itself, for requests it
// refuses to send and replies it refuses to believe). Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_STATUS_H_
#define KVSERVICE_CLIENT_STATUS_H_

#include <chrono>
#include <map>
#include <optional>
#include <string>

#include "absl/status/status.h"

namespace kvservice::client {

// Reasons that only this library gives. REQUEST_INVALID: the request contradicts itself and was not
// sent. REPLY_MALFORMED: the reply does not fit the request and nothing of it was used.
// SERVER_UNREACHABLE: no connection came about in time. LANE_UNAVAILABLE: Transport::kLane was
// asked for, and the server is on another host or offers none; or a prepared call cannot go through
// the lane. LANE_BROKEN: a prepared call had no answer, and its stream was let go of without one.
inline constexpr char kRequestInvalid[] = "REQUEST_INVALID";
inline constexpr char kReplyMalformed[] = "REPLY_MALFORMED";
inline constexpr char kServerUnreachable[] = "SERVER_UNREACHABLE";
inline constexpr char kLaneUnavailable[] = "LANE_UNAVAILABLE";
inline constexpr char kLaneBroken[] = "LANE_BROKEN";

// UPPER_SNAKE and stable across releases: "POSITION_GAP", "GENERATION_MISMATCH". Empty for OK and
// for errors that no server made, such as a broken connection.
std::string ReasonOf(const absl::Status& status);

// Path of the offending request field, "rows[2].position"; empty when no field is to blame.
std::string FieldOf(const absl::Status& status);

// Everything variable in the message: {"current_length", "128"}.
std::map<std::string, std::string> MetadataOf(const absl::Status& status);

// How long to wait at least before the call is worth repeating; nothing when the server did not say
// that repeating helps.
std::optional<std::chrono::milliseconds> RetryDelayOf(const absl::Status& status);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_STATUS_H_
