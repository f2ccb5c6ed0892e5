#!/usr/bin/env python3
"""Breaks the certificates on purpose, one place at a time, and checks that a named test notices.

Each mutation drops one rounding, one verification, one step of the sampler or one rule. It is
applied to a copy of the sources in build/mutants, the named test alone is built and run, and the
copy is put right again. A mutation that its test does not fail on has *survived*: either the test
is too weak or the code is not needed. The last line is "N caught, N survived"; the exit status is
1 if one survived, was not found in the sources, or does not compile.
"""

import argparse
import collections
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutants"
COPIED = ["attention", "selector", "kvservice", "client", "wire", "proto", "tests",
          "CMakeLists.txt"]
BUILD_TIMEOUT_S = 900
TEST_TIMEOUT_S = 300
# So that attacks on whole devices have time to find what a unit test would see at once.
CERTIFICATES = "60000"

# `text` occurs once in `file`; with `replacement` in its place `test` must fail. `only` filters the
# cases of the test ("" = all).
Mutation = collections.namedtuple("Mutation", "name file text replacement test only")

LOG_MASS = "attention/log_mass.cc"
ROUNDING = "attention/rounding.h"
SCAN_TERMS = "attention/scan_terms.h"
SKETCH = "attention/sketch_encode-inl.h"
DRAWS_H = "attention/draws.h"
DRAWS = "attention/draws.cc"
SAMPLED = "attention/sampled_bound.cc"
OUTPUT = "attention/output_error.cc"
PROOF = "attention/head_proof.cc"
GROWING = "attention/growing.h"
SCAN = "attention/cpu/scan_kernel.cc"
ATTEND = "attention/cpu/attend_kernel.cc"
EXP = "attention/cpu/exp.h"
SCORE = "attention/cpu/score_kernel.cc"
POPULATION = "attention/cpu/population.cc"
REPLY = "kvservice/server/convert_attend.cc"
KEYS = "kvservice/draw_keys.cc"
LANE = "kvservice/server/lane.cc"
CLIENT_LANE = "client/lane.cc"
REGION = "kvservice/server/region_copy.cc"
TIER = "kvservice/cache/rocksdb_tier.cc"
RECORD = "kvservice/cache/slice_record.cc"
CHECKSUM = "kvservice/cache/checksum.cc"
WORKER = "kvservice/disk_worker.cc"
STORE = "kvservice/sequence_store.cc"
RECOVERY = "kvservice/store_recovery.cc"
TABLE = "kvservice/sequence_table.cc"
PREFIX_CHAIN = "kvservice/prefix_chain.cc"
PROMPT = "kvservice/declared_prompt.cc"
ACCESS = "kvservice/server/access.cc"
TENANCY = "kvservice/server/tenancy.cc"
TLS = "kvservice/server/tls.cc"
GATE = "kvservice/server/gate.cc"
RPC = "kvservice/server/rpc_server.cc"
APPEND_STREAM = "kvservice/server/append_stream.cc"
ATTEND_STREAM = "kvservice/server/attend_stream.cc"
OTHERS = "kvservice/server/other_methods.cc"
ACCESS_LOG = "kvservice/server/access_log.cc"
OWNERS = "kvservice/cache/block_owners.cc"
POOL = "kvservice/cache/block_pool.cc"
ACCOUNTS = "kvservice/cache/owner_accounts.cc"
EVICTIONS = "kvservice/evictions.cc"
TENANTS = "kvservice/tenants.cc"

ATTACK = "*FindsNothing*"

MUTATIONS = [Mutation(*fields) for fields in [
    # ---- Outward rounding of masses ----
    ("widen_up", LOG_MASS, "? x + kRelative * (std::fabs(x) + 1.0) : x", "? x : x",
     "log_mass_test", ""),
    ("widen_down", LOG_MASS, "? x - kRelative * (std::fabs(x) + 1.0) : x", "? x : x",
     "log_mass_test", ""),
    ("add_upper", LOG_MASS, "return {WidenUp(AddOrdered(a.value, b.value))};",
     "return {AddOrdered(a.value, b.value)};", "log_mass_test", ""),
    ("add_lower", LOG_MASS, "return {WidenDown(AddOrdered(a.value, b.value))};",
     "return {AddOrdered(a.value, b.value)};", "log_mass_test", ""),
    ("log_of_upper", LOG_MASS, "kLogZero : WidenUp(std::log(mass))", "kLogZero : std::log(mass)",
     "log_mass_test", ""),
    ("log_of_lower", LOG_MASS, "return {WidenDown(std::log(mass))};", "return {std::log(mass)};",
     "log_mass_test", ""),
    ("share_difference_down", LOG_MASS, "const double x = WidenDown(kept.value - dropped.value);",
     "const double x = kept.value - dropped.value;", "log_mass_test", ""),
    ("share_difference_up", LOG_MASS, "const double x = WidenUp(kept.value - dropped.value);",
     "const double x = kept.value - dropped.value;", "log_mass_test", ""),
    ("share_upper", LOG_MASS, "share * (1.0 + kRelative)", "share", "log_mass_test", ""),
    ("share_lower", LOG_MASS, "share * (1.0 - kRelative)", "share", "log_mass_test", ""),
    ("share_never_zero", LOG_MASS, "std::max(DBL_MIN, share * (1.0 + kRelative))",
     "share * (1.0 + kRelative)", "log_mass_test", ""),
    ("unknown_share_is_one", LOG_MASS, "if (std::isinf(kept.value)) return {1.0};", "",
     "log_mass_test", ""),
    ("bound_of_one", LOG_MASS,
     "return {std::min(1.0, std::max(DBL_MIN, share * (1.0 + kRelative)))};",
     "return {share > 0.0 ? 1.0 : 0.0};", "adversary_test", ATTACK),
    ("float_up", LOG_MASS,
     "return std::bit_cast<float>(nearest < 0.0F ? bits - 1 : bits + 1);",
     "return std::bit_cast<float>(nearest < 0.0F ? bits : bits);", "log_mass_test", ""),
    # ---- Directed rounding of single operations ----
    ("next_up", ROUNDING, "std::bit_cast<uint64_t>(x + 0.0) + 1",
     "std::bit_cast<uint64_t>(x + 0.0)", "rounding_test", ""),
    ("next_down", ROUNDING, "std::bit_cast<uint64_t>(x) - 1", "std::bit_cast<uint64_t>(x)",
     "rounding_test", ""),
    ("sum_up", ROUNDING, "return error > 0.0 ? NextUp(sum) : sum;", "return sum;",
     "rounding_test", ""),
    ("sum_down", ROUNDING,
     "return error < 0.0 || sum > std::numeric_limits<double>::max() ? NextDown(sum) : sum;",
     "return sum;", "rounding_test", ""),
    ("product_up", ROUNDING, "return NextUp(a * b);", "return a * b;", "rounding_test", ""),
    ("product_down", ROUNDING, "return NextDown(a * b);", "return a * b;", "rounding_test", ""),
    ("quotient_up", ROUNDING, "return NextUp(a / b);", "return a / b;", "rounding_test", ""),
    ("quotient_down", ROUNDING, "return NextDown(a / b);", "return a / b;", "rounding_test", ""),
    ("integer_up", ROUNDING, "< x ? NextUp(nearest) : nearest", "< x ? nearest : nearest",
     "rounding_test", ""),
    ("integer_down", ROUNDING, "> x ? NextDown(nearest) : nearest", "> x ? nearest : nearest",
     "rounding_test", ""),
    # ---- The scan formula ----
    ("scan_margin", SCAN_TERMS, "kScanMargin = 1.0 + 0x1p-12", "kScanMargin = 1.0",
     "sketch_test", ""),
    ("scan_roundoff", SCAN_TERMS, "kScanRoundoff<Real> * size + kScanFloor<Real>;",
     "kScanRoundoff<Real> * 0 * size;", "sketch_test", ""),
    ("scan_projection_rounding", SCAN_TERMS, "kMargin * (outside_ball + half_steps) + g",
     "kMargin * outside_ball + g", "sketch_test", ""),
    ("scan_outside_ball", SCAN_TERMS, "kMargin * (outside_ball + half_steps) + g",
     "kMargin * half_steps + g", "sketch_test", ""),
    ("scan_radius", SCAN_TERMS, "kMargin * std::sqrt(b_squares) * static_cast<Real>(page.rmax)",
     "std::sqrt(b_squares) * static_cast<Real>(page.rmax) * Real(0.999)", "sketch_test", ""),
    ("softcap_up", SCAN_TERMS, "cap > 0.0F ? WidenUp(Softcap(cap, s)) : s",
     "cap > 0.0F ? Softcap(cap, s) : s", "sketch_test", ""),
    ("softcap_down", SCAN_TERMS, "cap > 0.0F ? WidenDown(Softcap(cap, s)) : s",
     "cap > 0.0F ? Softcap(cap, s) : s", "sketch_test", ""),
    # ---- The margins of the vector kernels ----
    ("cpu_scan_rounding", SCAN, "hn::MulAdd(outside, Set(kScanMargin), rounding)",
     "hn::Mul(outside, Set(kScanMargin))", "cpu_scan_test", ""),
    ("cpu_scan_factor_rounding", SCAN, "miss_[i] = kFactorMiss * 7.5 *", "miss_[i] = 0.0 *",
     "cpu_scan_test", ""),
    ("cpu_scan_projections", SCAN, "hn::MulAdd(Load(terms->scale + i), miss, half_steps)",
     "hn::Mul(Load(terms->scale + i), miss)", "cpu_scan_test", ""),
    ("cpu_scan_ball", SCAN, "hn::Add(Load(terms->outside_ball + i), missed)", "missed",
     "cpu_scan_test", ""),
    ("cpu_scan_exponential", SCAN, "Set(2 * kExpError * kUp + softcap_error)",
     "Set(0.0 * softcap_error)", "cpu_scan_test", ""),
    # What a large argument costs the exponential cannot show in a scan: without fused
    # multiply-adds, where it costs something, vectors have four lanes, and what the scan allows for
    # roundings counts a tree of sixteen and two more (5 u of a logit; the exponential takes 2 u).
    # So the number itself is what is tried.
    ("exp_argument_error", EXP, "kExpArgumentError = 0x1p-23", "kExpArgumentError = 0x1p-27",
     "cpu_exp_test", ""),
    ("exp_error", EXP, "kExpError = 0x1p-22", "kExpError = 0x1p-24", "cpu_exp_test", ""),
    ("cpu_scan_largest", SCAN, "const auto known = hn::Le(largest, Set(kLogitMax));",
     "const auto known = hn::Le(largest, Set(1e30 * kLogitMax));", "adversary_test", ATTACK),
    ("cpu_kept_upper", ATTEND, "WidenUp(lse + error + kMassError)", "lse", "cpu_attend_test", ""),
    ("cpu_kept_lower", ATTEND, "WidenDown(lse - error - kMassError)", "lse", "cpu_attend_test", ""),
    ("cpu_kept_logits", ATTEND, "const double error = size * (roundings * 0x1p-24 +",
     "const double error = size * (0.0 * roundings +", "cpu_attend_test", ""),
    ("cpu_output_arithmetic", ATTEND,
     "moved + (work.token_count + 16.0) * 0x1p-24 + kMassError;", "0.0 * moved;",
     "adversary_test", ATTACK),
    ("cpu_drawn_logits", SCORE,
     "scores[i].error = error * (1.0 + 0x1p-40) + static_cast<double>(cap) * 0x1p-40;",
     "scores[i].error = 0.0 * error;", "sampling_inputs_test", ""),
    ("cpu_value_norm_down", SCORE, "squares * (1.0 - kRoundoff) - kUnderflow",
     "squares * (1.0 + kRoundoff)", "sampling_inputs_test", ""),
    ("cpu_value_norm_up", SCORE, "std::sqrt(largest_squares * (1.0 + kRoundoff) + kUnderflow)",
     "std::sqrt(largest_squares * (1.0 - kRoundoff))", "sampling_inputs_test", ""),
    ("cpu_weights_up", POPULATION, "hn::Ceil(hn::Min(scaled, largest))",
     "hn::Floor(hn::Min(scaled, largest))", "sampling_inputs_test", ""),
    ("cpu_weights_at_least_one", POPULATION, "hn::Max(integer, hn::Set(di, 1))", "integer",
     "sampling_inputs_test", ""),
    ("cpu_halves_not_finite", "attention/cpu/vector-inl.h",
     "const auto other = hn::Or(magnitude, hn::Set(di, 0x70000000));",
     "const auto other = scaled;", "adversary_test", ATTACK),
    # ---- The encoder's verifications ----
    ("sketch_cells", SKETCH, "residual.within_cells = within == head_dim;",
     "residual.within_cells = true;", "sketch_test", ""),
    ("sketch_radius_code", SKETCH,
     "if (RadiusHolds(largest, next, norm)) code = next;", "code = next;", "sketch_test", ""),
    ("sketch_radius", SKETCH,
     "if (!RadiusHolds(page.rmax, page.r[token], residual.norm)) return false;", "",
     "sketch_test", ""),
    ("sketch_value_norm", SKETCH,
     "if (!RadiusHolds(page.vmax, page.vn[token], numbers.v_norm[token])) return false;", "",
     "sketch_test", ""),
    ("sketch_projection", SKETCH,
     "for (uint32_t j = 0; j < at.direction_count; ++j) {\n    if (!ProjectionHolds(",
     "for (uint32_t j = 0; j < 0 * at.direction_count; ++j) {\n    if (!ProjectionHolds(",
     "sketch_test", ""),
    ("sketch_finite_rows", SKETCH,
     "if (!LoadRows(layout, rows, &numbers)) return WriteAllExact(at, page);",
     "LoadRows(layout, rows, &numbers);", "sketch_test", ""),
    ("sketch_finite_norms", SKETCH,
     "if (!std::isfinite(norms[0]) || !std::isfinite(norms[1])) return false;", "", "sketch_test",
     ""),
    ("sketch_step_up", SKETCH, "if (static_cast<double>(FloatFromFloat16(bits)) < x) ++bits;", "",
     "sketch_test", ""),
    ("sketch_norm_up", SKETCH,
     "std::sqrt(Dot(head_dim, scaled.data(), scaled.data())) * kNormMargin",
     "std::sqrt(Dot(head_dim, scaled.data(), scaled.data())) * (1.0 - 1e-9)", "sketch_test", ""),
    ("sketch_norms_up", SKETCH, "{RoundUpToFloat(rmax), RoundUpToFloat(vmax)}",
     "{static_cast<float>(rmax), static_cast<float>(vmax)}", "sketch_test", ""),
    # That it is rounded up cannot show: a step may be too small by 2^-9 before 127 of them and half
    # of one do not reach what is verified against them.
    ("sketch_projection_step_least", SKETCH,
     "std::max(needed, kProjectionStepMin * numbers.projection_scale[j])", "needed",
     "sketch_test", ""),
    ("radius_scale_up", "attention/sketch.cc", "static_cast<float>(power * (1.0 + 1e-6))) + 1)",
     "static_cast<float>(power * (1.0 - 1e-6))))", "sketch_test", ""),
    ("sinks_in_sketch", SKETCH, "block_index == 0 ? (uint64_t{1} << kSketchSinks) - 1 : 0",
     "block_index == 0 ? uint64_t{0} : 0", "sketch_test", ""),
    ("sinks_in_plan", "attention/cpu/group.cc", "RangeWord(block, 0, plan.sink_end) |",
     "RangeWord(block, 0, 0 * plan.sink_end) |", "adversary_test", ATTACK),
    # ---- The sampler ----
    ("draws_rejection", DRAWS_H,
     "if (static_cast<uint64_t>(product) >= rejected_ || retry == kRetryLast) break;", "break;",
     "draws_test", ""),
    ("draws_retry", DRAWS, "nonce[2] |= static_cast<uint32_t>(retry) << 16;", "", "draws_test", ""),
    ("draws_repetition", DRAWS_H, "if (!Insert(token->page, token->token)) continue;", "",
     "draws_test", ""),
    ("draws_round", DRAWS, "stream.round | static_cast<uint32_t>(stream.purpose) << 8",
     "static_cast<uint32_t>(stream.purpose) << 8", "draws_test", ""),
    ("draws_purpose", DRAWS, "stream.round | static_cast<uint32_t>(stream.purpose) << 8",
     "stream.round", "draws_test", ""),
    ("draws_query_head", DRAWS,
     "stream.kv_head | static_cast<uint32_t>(stream.query_head) << 16", "stream.kv_head",
     "draws_test", ""),
    # ---- Freshness of the counter ----
    ("fresh_round", PROOF, "stream.round = static_cast<uint8_t>(budget.round() - 1);",
     "(void)budget;", "freshness_test", ""),
    ("fresh_purpose", PROOF, "stream.purpose = purpose;", "(void)purpose;", "freshness_test", ""),
    ("fresh_heads_cpu", "attention/cpu/group.cc", "{.kv_head = static_cast<uint16_t>(kv_head),",
     "{.kv_head = static_cast<uint16_t>(0 * kv_head),", "freshness_test", ""),
    ("fresh_call_number", KEYS, "message.Update(BigEndian<sizeof(uint64_t)>(call_number));",
     "message.Update(BigEndian<sizeof(uint64_t)>(0 * call_number));", "draw_keys_test", ""),
    ("fresh_row", KEYS, "message.Update(BigEndian<sizeof(uint32_t)>(row));",
     "message.Update(BigEndian<sizeof(uint32_t)>(0 * row));", "draw_keys_test", ""),
    ("fresh_layer", KEYS, "message.Update(BigEndian<sizeof(uint32_t)>(layer));",
     "message.Update(BigEndian<sizeof(uint32_t)>(0 * layer));", "draw_keys_test", ""),
    ("fresh_epoch", KEYS, "message.Update(epoch_);", "", "draw_keys_test", ""),
    # ---- Sampled bounds ----
    ("sampled_weight_up", SAMPLED, "std::min(1.0, DivideUp(exact, DoubleDown(weight)))",
     "0.5 * std::min(1.0, DivideUp(exact, DoubleDown(weight)))", "sampled_bound_test", ""),
    ("sampled_exact_sum_up", SAMPLED, "exact_ = AddUp(exact_, exact);", "exact_ += exact;",
     "sampled_bound_test", ""),
    ("sampled_upper_end", SAMPLED, "  return z_high;", "  return z_low;", "sampled_bound_test", ""),
    ("weight_of_mass_up", SAMPLED,
     "std::exp(WidenUp(WidenUp(mass.value - ref) + kLnWeightsPerUnit))",
     "std::exp(mass.value - ref + kLnWeightsPerUnit) * (1.0 - 0x1p-50)", "sampled_bound_test", ""),
    ("weight_of_mass_down", SAMPLED,
     "std::exp(WidenDown(WidenDown(mass.value - ref) + kLnWeightsPerUnit))",
     "std::exp(mass.value - ref + kLnWeightsPerUnit) * (1.0 + 0x1p-50)", "sampled_bound_test", ""),
    ("budget_spends_once", GROWING, "const double share = one_round_ ? 1.0 : kShares[round_];",
     "const double share = 1.0;", "growing_test", ""),
    ("moved_mass_down", GROWING, "std::min(WidenDown(moved.value - bound.value), -0x1p-52)",
     "std::min(WidenUp(moved.value - bound.value), -0x1p-52)", "growing_test", ""),
    # ---- Output errors ----
    ("share_bound_excess", OUTPUT, "return AddUp(f, DivideUp(excess * (1.0 + 0x1p-50),",
     "return AddUp(f, 0.0 * DivideUp(excess * (1.0 + 0x1p-50),", "output_error_test", ""),
    ("vector_radius_upper_end", OUTPUT, "return DivideUp(x, static_cast<double>(count_));",
     "return 0.99 * x / static_cast<double>(count_);", "output_error_test", ""),
    ("vague_weights", OUTPUT, "SumUp(weight_error_, count()) / draws + kMeanRoundoff",
     "0.0 * SumUp(weight_error_, count())", "output_error_test", ""),
    ("unknown_mass_of_output", OUTPUT,
     "return (radius + moved * miss) / t * (1.0 + kNormRoundoff);",
     "return (radius + 0.0 * miss) / t;", "output_error_test", ""),
    ("error_adds_arithmetic", PROOF,
     "const double error = AddUp(dropping, evidence.arithmetic_error);",
     "const double error = dropping;", "adversary_test", ATTACK),
    ("error_adds_rounding_to_float", PROOF,
     "AddUp(evidence.arithmetic_error, evidence.value_norm_upper * 2.0 * kFloatRounding)",
     "0.0 * kFloatRounding", "freshness_test", ""),
    ("error_counts_both_probabilities", PROOF,
     "NextUp(certificate_.failure_probability + output_budget_.spent());",
     "0.0 * output_budget_.spent();", "adversary_test", ATTACK),
    # ---- What leaves the service ----
    ("reply_upper", REPLY, "RoundUpToFloat(head.dropped_mass_upper.value)",
     "static_cast<float>(head.dropped_mass_upper.value)", "convert_test", ""),
    ("reply_lower", REPLY, "RoundDownToFloat(head.dropped_mass_lower.value)",
     "static_cast<float>(head.dropped_mass_lower.value)", "convert_test", ""),
    ("reply_error", REPLY, "RoundUpToFloat(head.output_error_upper)",
     "static_cast<float>(head.output_error_upper)", "convert_test", ""),
    ("reply_relative_error", REPLY, "RoundUpToFloat(RelativeOutputError(head))",
     "static_cast<float>(RelativeOutputError(head))", "convert_test", ""),
    ("reply_value_norm", REPLY, "RoundDownToFloat(head.value_norm_lower)",
     "static_cast<float>(head.value_norm_lower)", "convert_test", ""),
    # ---- Shared memory is not believed ----
    ("lane_message_range", LANE,
     "if (bytes > shape.request_bytes || !wire::IsRange(offset, bytes, memory_.all().size())) {",
     "if (bytes > shape.request_bytes) {", "lane_test", "*MessagesMustLie*"),
    ("lane_tensor_range", REGION,
     "if (!wire::IsRange(range.offset_bytes(), bytes, shared_.size())) {", "if (false) {",
     "lane_test", "*RangesThatCannotBe*"),
    ("lane_tensor_total", REGION, "if (!wire::IsRange(used_, bytes, bytes_max_)) {", "if (false) {",
     "lane_test", "*RangesThatCannotBe*"),
    ("lane_seals", "wire/shared_memory.cc",
     "if (seals < 0 || (seals & kSeals) != kSeals) return false;", "if (seals < 0) return false;",
     "lane_test", "*OnlySealedMemory*"),
    ("lane_lost_request", LANE,
     "if (wire::Load(head->request_number) != number) host_->wake();",
     "static_cast<void>(number);", "lane_test",
     "*RequestsBeforeTheAnswer*"),
    # ---- Calls that a GPU's stream rings ----
    ("prepared_calls_wake_the_server", CLIENT_LANE,
     "return WakeServer() ? Outcome::kAnswered : Outcome::kBroken;", "return Outcome::kAnswered;",
     "prepared_attend_test", "*AServerThatSleeps*"),
    ("dropped_calls_wake_the_server", CLIENT_LANE, "if (!is_answered && !WakeServer()) Break();",
     "", "prepared_attend_test", "*AreRungMayBeGivenUp*"),
    ("prepared_calls_release_the_stream", CLIENT_LANE,
     "wire::Store(&head->reply_number, slots_[i].number);", "",
     "prepared_attend_test", "*LetsStreamsGo*"),
    ("released_streams_store_nothing", CLIENT_LANE,
     "for (const uint32_t i : waiting) wire::Store(&memory_.slot(i)->request_offset, kNowhere);",
     "", "prepared_attend_test", "*TimeThatIsOver*"),
    ("released_calls_are_not_answered", CLIENT_LANE,
     "if (outcome == Outcome::kAnswered && !IsReleased(index)) {",
     "if (outcome == Outcome::kAnswered) {", "prepared_attend_test", "*LetsStreamsGo*"),
    ("prepared_outputs_have_their_place", "client/replies.cc",
     "if (!IsAt(reply.out, region.places->out)) return MalformedReply(\"out\", kProblem);", "",
     "lane_client_test", "*WhereTheLayoutSays*"),
    # ---- Nothing lost, nothing wrong: the disk tier ----
    ("writes_are_synced", TIER, "how.sync = is_synced;", "how.sync = is_synced && false;",
     "power_cut_test", "*NothingAcknowledged*"),
    ("a_group_is_synced_for_any", WORKER, "is_synced = is_synced || job.is_synced;", "",
     "power_cut_test", "*NothingAcknowledged*"),
    ("checksums_are_compared", CHECKSUM, "return equal ? bytes : std::string_view();",
     "return equal || !equal ? bytes : std::string_view();", "slice_record_test", ""),
    ("records_know_their_place", RECORD,
     'if (!(found == expected)) return Damaged(expected, "is of another place or time");', "",
     "slice_record_test", ""),
    ("layers_end_where_they_should", STORE,
     "if (said[layer].last != loading.progress.layers[layer].last) return false;",
     "if (said[layer].last != loading.progress.layers[layer].last) return true;",
     "stored_engine_test", ""),
    ("stale_state_shows", TIER,
     "if (counted->opens > state.counts.opens) state.phase = Phase::kOpen;", "",
     "rocksdb_tier_test", ""),
    ("forgetful_database_shows", TIER,
     "if (counted->opens < state.counts.opens && state.phase == Phase::kOpen) {", "if (false) {",
     "rocksdb_tier_test", "*OfBefore*"),
    ("missing_database_shows", TIER,
     "options.create_if_missing = state.phase == Phase::kCreating;",
     "options.create_if_missing = true;", "rocksdb_tier_test", ""),
    ("crashes_change_generations", STORE,
     "(crash_count_ - sequence.state.crash_count) * kGenerationsPerCrash", "0",
     "stored_engine_test", ""),
    ("rows_on_their_way_count", STORE, "AddBytes(*record, more_bytes);",
     "AddBytes(*record, more_bytes / 2);", "stored_engine_test", "*Together*"),
    ("truncates_are_stored", STORE,
     "CutLayer(record->id, shape, *record->cache, layer, length, record->stored.get(), &batch);",
     "if (length == UINT32_MAX) record->stored.reset();", "stored_engine_test", "*Truncate*"),
    ("loss_is_the_owners", TABLE, "return found != lost_.end() && found->second == tenant;",
     "return found != lost_.end() && found->second.size() + tenant.size() > 0;", "bit_flip_test",
     ""),
    ("inventory_finds_the_missing", RECOVERY,
     "ChecksumOfRow(**row) == entry.state", "true", "stored_engine_test", ""),
    # ---- Nobody let in ----
    ("tls_off_loopback", RPC, "if (!options.tls.has_value() && !address.endpoint.IsLocal()) {",
     "if (false) {", "access_test", "ListenTest*"),
    ("client_certificates", TLS, "GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY",
     "GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_BUT_DONT_VERIFY", "access_test", "*NoCallComes*"),
    ("tls_used_on_tcp", RPC, "if (tls.has_value() && !is_unix) return NewTlsCredentials(*tls);",
     "", "access_test", "*NoCallComes*"),
    ("key_mode", TLS, "if (absl::Status mode = CheckKeyMode(files.key); !mode.ok()) return mode;",
     "static_cast<void>(CheckKeyMode(files.key));", "access_test", "TlsFilesTest*"),
    ("one_uri", TENANCY, "if (values.size() != 1) return \"\";", "if (values.empty()) return \"\";",
     "access_test", "*KnownIdentity*"),
    ("known_identity", ACCESS, "if (caller.tenant.empty()) {", "if (false) {", "access_test",
     "*KnownIdentity*"),
    ("role_needed", ACCESS, "method.is_for_all || caller.roles.Shares(method.any_of)",
     "method.is_for_all || !caller.roles.empty()", "access_test", "*AsksForItsRole*"),
    ("expiry_is_looked_at", ACCESS, "if (caller.is_expired) {", "if (false) {", "access_test",
     "*Outlive*"),
    ("admin_side_is_for_admins", GATE,
     "if (!access.ok() || options_.needed.empty()) return access;",
     "if (!access.ok() || !options_.needed.empty()) return access;", "access_test",
     "*AsksForItsRole*"),
    ("append_passes_the_gate", APPEND_STREAM,
     "method_->host.gate->Admit(method_->access, caller_);", "absl::OkStatus();", "access_test",
     "*AsksForItsRole*"),
    ("attend_stream_passes_the_gate", ATTEND_STREAM,
     "const absl::Status status = calls.gate->Admit(method_->access, caller);",
     "const absl::Status status;", "access_test", "*AsksForItsRole*"),
    ("other_methods_pass_the_gate", OTHERS, "methods_.host->gate->Allow(access, caller);",
     "absl::OkStatus();", "access_test", "*AsksForItsRole*"),
    ("no_reflection_past_the_gate", RPC,
     "if (options.tls.has_value()) builder.SetOption(std::make_unique<WithoutReflection>());", "",
     "access_test", "*Reflection*"),
    ("sequences_have_a_tenant", TABLE,
     "if (record->tenant != tenant || record->lease_end_ns <= now_ns) return nullptr;",
     "if (record->lease_end_ns <= now_ns) return nullptr;", "access_test", "*AnothersSequence*"),
    ("blocks_are_cleared", OWNERS, "if (old.owner != owner) clear(from, to - from);", "",
     "block_pool_test", "*ChangesHands*"),
    ("hosts_are_bounded", "kvservice/server/accept_loop.cc",
     "count == count_of_host_.end() || count->second < limits_.per_host", "true",
     "transport_test", "*Host*:*OneAddress*"),
    ("refusals_are_bounded", ACCESS_LOG, "if (refusals_in_second_ >= kRefusalsPerSecondMax) {",
     "if (false) {", "access_test", "AccessLogTest*"),
    # ---- Rows on the host ----
    ("moved_rows_are_shown", "kvservice/cache/sequence.cc",
     "if (std::exchange(state.moves, pool_->moves()) != pool_->moves()) {", "if (false) {",
     "sequence_test", "*KeepsUp*"),
    ("pending_rows_stay", "kvservice/executor.cc",
     "if (!attend_batch_.has_begun()) placement_.MakeRoom(bytes, what);",
     "placement_.MakeRoom(bytes, what);", "engine_test", "*RowsStayWhereTheyAre*"),
    ("rows_are_copied_before_they_go", POOL, "  device_->Copy(copies);\n  const RowPlace from",
     "  const RowPlace from", "block_pool_test", "TwoArenasTest.RowsMove*"),
    ("sketches_fit_in_one_piece", "kvservice/row_placement.cc",
     "pool_->device_arena().Fits(bytes, block_count)", "bytes_free() >= bytes * block_count",
     "power_cut_test", "*WhatOnceWentWrong*"),
    # ---- Limits per tenant ----
    ("tenants_have_a_maximum", POOL, "if (accounts_.BeyondMax(owner, total) > 0) {",
     "if (false) {", "engine_test", "QuotaTest.*MaximumIsRefused*"),
    ("what_is_reserved_is_kept", POOL,
     "if (held > 0 && bytes_free() < held + total) return BlockRef();", "", "engine_test",
     "QuotaTest.WhatIsReserved*"),
    ("blocks_are_counted_back", ACCOUNTS, "account->bytes -= bytes;", "", "engine_test",
     "QuotaTest.WhatForksShare*"),
    ("reserves_fit_the_pool", "kvservice/quota.cc", "if (reserved > left) {", "if (false) {",
     "engine_test", "QuotaTest.QuotasThatCannotBe*"),
    ("quotas_are_bounded", TENANTS,
     "if (is_new && set_.size() + options_->tenant_quotas.size() >= kTenantQuotasMax) {",
     "if (false) {", "engine_test", "QuotaTest.ThereAreOnlySoMany*"),
    ("disk_has_a_maximum", TENANTS,
     "if (used <= *bytes_max && more_bytes <= *bytes_max - used) return absl::OkStatus();",
     "if (used <= *bytes_max || used > *bytes_max) return absl::OkStatus();", "engine_test",
     "QuotaTest.RowsOnDisk*"),
    ("what_cannot_be_stored_stops_nobody", STORE,
     "return parts_.tenants->CheckDisk(candidate.tenant, bytes).ok();", "return bytes > 0;",
     "engine_test", "QuotaTest.RowsOnDisk*"),
    ("beyond_a_maximum_its_own_leave", EVICTIONS,
     "if (ask.cause == EvictionCause::kTenantMax && owner != ask.owner) return;", "",
     "engine_test", "QuotaTest.BeyondItsMaximum*"),
    ("reserves_are_not_evicted", EVICTIONS,
     "if (owner != ask.owner && !StaysAboveReserve(*record)) return;", "", "engine_test",
     "QuotaTest.NobodyFallsBelow*"),
    ("the_tenant_is_chosen_first", EVICTIONS,
     "if (chosen != nullptr && beyond <= most) continue;",
     "if (chosen != nullptr && LastUsedNs(*chosen) <= LastUsedNs(*record)) continue;",
     "engine_test", "QuotaTest.EvictionTellsNothing*"),
    ("lowered_maxima_take_effect", STORE,
     "MakeRoom({.bytes = 0, .lack = Lack::kTenantPool, .owner = owner});",
     "static_cast<void>(owner);", "engine_test", "QuotaTest.AMaximumThatGoesBelow*"),
    # ---- Prefixes are a tenant's own, and what they say ----
    ("prefixes_have_a_tenant", PREFIX_CHAIN, "start.Update(BytesOf(tenant));", "", "engine_test",
     "PrefixChainTest*"),
    ("prefixes_have_tables", PREFIX_CHAIN, "start.Update(table_digest);", "", "engine_test",
     "PrefixChainTest*"),
    ("prefixes_are_keyed", PREFIX_CHAIN, "HmacSha256 start = keyed_;",
     "HmacSha256 start(absl::Span<const std::byte>{});", "engine_test", "PrefixChainTest*"),
    ("prefixes_follow_each_other", PREFIX_CHAIN, "next.Update(digest);",
     "if (block == 0) next.Update(digest);", "engine_test", "PrefixChainTest*"),
    ("matches_are_compared", PROMPT, "source->tenant == record->tenant &&", "", "engine_test",
     "BeginWithTest*"),
    ("matched_tables_are_compared", PROMPT, "source->tables == record->tables &&", "",
     "engine_test", "BeginWithTest*"),
    ("matched_sequences_choose_for_themselves", PROMPT, "record->cache->DropLists();", "",
     "engine_test", "PrefixTest*"),
    ("truncates_end_matching", "kvservice/executor.cc",
     "if (record->prefix != nullptr) record->prefix->Cut(length / kBlockTokens);", "",
     "engine_test", "PrefixTest*"),
    ("what_left_memory_is_not_matched", STORE,
     "if (record->prefix != nullptr) record->prefix->Offer(0);", "", "stored_engine_test",
     "*APrefix*"),
    ("every_layer_has_what_is_matched", "kvservice/sequence_table.h",
     "prefix->Offer(cache->length_min() / kBlockTokens);",
     "prefix->Offer(cache->length_max() / kBlockTokens);", "engine_test", "PrefixTest*"),
    ("requests_with_other_tokens_are_others", "kvservice/executor.cc",
     "record->prompt.value_or(prompt.checksum) == prompt.checksum", "true", "engine_test",
     "PrefixTest*"),
    # ---- Calls beside each other on the device ----
    ("a_sequence_is_in_one_call", "kvservice/attend_batch.cc",
     "if (record != nullptr && record->rows_begun > 0) return false;", "",
     "engine_test", "*ASequenceIsNeverInTwoCalls*"),
    ("sweeps_are_not_starved", "kvservice/engine.cc", "begun < kBesideMax && TakeBeside",
     "TakeBeside", "engine_test", "*AStreamOfCallsStarvesNothing*"),
    # ---- Sequences that push each other out ----
    ("shared_tensors_are_copied", "kvservice/tensor_copies.cc",
     "if (tensors[i] == nullptr || !tensors[i]->is_shared) continue;", "continue;", "engine_test",
     "EngineTest.SharedTensorsAreReadOnce"),
    ("keys_are_copied_at_once", "kvservice/server/convert_attend.cc",
     "if (region != nullptr) region->LeaveLarge(false);", "", "convert_test",
     "ConvertAttendTest.*"),
    ("batches_look_again", "kvservice/engine.cc",
     "while (ParkThoseThatWait(calls, is_again)) is_again = true;",
     "ParkThoseThatWait(calls, is_again);", "stored_engine_test", "*HadToLeaveForAnother*"),
    # ---- Looking for damage on disk ----
    ("scrub_compares_checksums", "kvservice/store_scrub.cc",
     "if (expected.has_value() && *expected != slice.checksum) break;", "", "engine_test",
     "StoreScrubTest.AStaleSliceIsDamage"),
    ("scrub_writes_again", "kvservice/store_scrub.cc",
     "if (host_->MendSlice(record, layer, block).ok())", "if (layer < UINT32_MAX)",
     "engine_test", "StoreScrubTest.WhatMemoryHasIsWrittenAgain"),
    ("scrub_checks_rows", "kvservice/store_scrub.cc",
     "return row.ok() && !Unseal(*row).empty() && ChecksumOfRow(*row) == expected;",
     "return row.ok() || expected == Checksum{};", "engine_test",
     "StoreScrubTest.RowsOfSequences*"),
]]


# ---- The list ------------------------------------------------------------------------------------


def misplaced(root):
    """Yields what is wrong with the list itself: texts that are not where it says."""
    seen = set()
    for mutation in MUTATIONS:
        if mutation.name in seen:
            yield f"{mutation.name}: the name is used twice"
        seen.add(mutation.name)
        path = root / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.text) if path.exists() else 0
        if count != 1:
            yield f"{mutation.name}: {mutation.file} has its text {count} times, expected once"
    listed = (root / "CMakeLists.txt").read_text(encoding="utf-8")
    for test in sorted({mutation.test for mutation in MUTATIONS}):
        if f"kv_test({test}\n" not in listed:
            yield f"{test}: CMakeLists.txt has no such test"


def chosen_mutations(only):
    if not only:
        return MUTATIONS
    wanted = only.split(",")
    return [mutation for mutation in MUTATIONS
            if any(word in (mutation.name, mutation.test) for word in wanted)]


# ---- The copy ------------------------------------------------------------------------------------


def copy_changed(source, target):
    """Copies files whose bytes differ, so that builds start from what is there already."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in source.iterdir() if path.name != "__pycache__"}
        for old in target.iterdir():
            if old.name not in names:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for name in names:
            copy_changed(source / name, target / name)
    elif not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)


def prepare():
    for name in COPIED:
        copy_changed(ROOT / name, WORK / "src" / name)
    if (WORK / "build" / "build.ninja").exists():
        return
    configure = ["cmake", "-S", WORK / "src", "-B", WORK / "build", "-G", "Ninja",
                 "--log-level=WARNING", "-DKVSERVICE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release",
                 "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -g1 -DNDEBUG"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)


def build(test, jobs):
    """Empty on success, else what the compiler said."""
    command = ["cmake", "--build", WORK / "build", "--target", test, "-j", str(jobs)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=BUILD_TIMEOUT_S, check=False)
    return "" if done.returncode == 0 else done.stdout


def passes(mutation):
    """A test that hangs has noticed too."""
    command = [WORK / "build" / "tests" / mutation.test]
    if mutation.only:
        command.append(f"--gtest_filter={mutation.only}")
    environment = dict(os.environ, KVSERVICE_ADVERSARY_CERTIFICATES=CERTIFICATES)
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, timeout=TEST_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


# ---- The run -------------------------------------------------------------------------------------


def sound_tests(mutations, jobs):
    """The tests that build and pass without any mutation; the others prove nothing."""
    sound = set()
    for mutation in mutations:
        if (mutation.test, mutation.only) in sound:
            continue
        message = build(mutation.test, jobs)
        if message:
            print(f"{mutation.test} does not build as it is:\n{message[-2000:]}", flush=True)
        elif not passes(mutation):
            print(f"{mutation.test} {mutation.only} fails as it is", flush=True)
        else:
            sound.add((mutation.test, mutation.only))
    return sound


def verdict_of(mutation, jobs):
    path = WORK / "src" / mutation.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(mutation.text, mutation.replacement), encoding="utf-8")
    try:
        message = build(mutation.test, jobs)
        if message:
            errors = [line for line in message.split("\n") if "error" in line]
            return "does not compile: " + (errors or [message])[0][:200]
        return "survived" if passes(mutation) else "caught"
    finally:
        path.write_text(right, encoding="utf-8")


def run(mutations, jobs, seconds_max):
    began = time.monotonic()
    prepare()
    sound = sound_tests(mutations, jobs)
    counts = collections.Counter()
    for mutation in mutations:
        if (mutation.test, mutation.only) not in sound:
            verdict = "not run: the test does not pass as it is"
        elif seconds_max and time.monotonic() - began > seconds_max:
            verdict = "not run: out of time"
        else:
            verdict = verdict_of(mutation, jobs)
        counts[verdict.split(":")[0]] += 1
        print(f"{mutation.name:34} {mutation.test:20} {verdict}", flush=True)
    others = sum(counts.values()) - counts["caught"] - counts["survived"]
    print(f"{others} without a verdict, {time.monotonic() - began:.0f} s")
    print(f"{counts['caught']} caught, {counts['survived']} survived")
    return counts["caught"] == len(mutations)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", help="comma-separated names of mutations or tests")
    parser.add_argument("--list", action="store_true", help="print the list and exit")
    parser.add_argument("--check", action="store_true", help="check the list and exit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--seconds-max", type=float, default=0, help="start no more after it")
    arguments = parser.parse_args()
    mutations = chosen_mutations(arguments.only)
    if arguments.list:
        for mutation in mutations:
            print(f"{mutation.name:34} {mutation.test:20} {mutation.file}")
        return 0
    wrong = list(misplaced(ROOT))
    for message in wrong:
        print(message)
    if arguments.check:
        print(f"{len(MUTATIONS)} mutations, {len(wrong)} messages")
    if wrong or arguments.check:
        return 1 if wrong else 0
    return 0 if run(mutations, arguments.jobs, arguments.seconds_max) else 1


if __name__ == "__main__":
    sys.exit(main())
