#include "traffic.h"

#include "block.h"

namespace ptx {

namespace {

constexpr u64 kFirstTableEntries = 1 << 12;
constexpr int kTurnBits = 32, kSiteBits = 26, kWarpBits = 5;
static_assert(kTurnBits + kSiteBits + kWarpBits < 64, "one bit tells loads from stores");

u64 access_key(Site site, bool stores) {
    u64 key = stores;
    key = key << kWarpBits | block.warp_index();
    key = key << kSiteBits | site.id;
    return key << kTurnBits | site.turn;
}

u64 mix(u64 a, u64 b) {  // multiplicative hashing, both words into the high bits and down again
    u64 h = (a ^ b * 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;
    return h ^ h >> 32;
}

}  // namespace

void TrafficCounter::start_launch(Traffic* traffic) {
    traffic_ = traffic;
    *traffic = Traffic{};
    table_.assign(kFirstTableEntries, Entry());
    used_ = block_number_ = 0;
}

void TrafficCounter::start_block() {
    block_number_++;
    used_ = 0;
}

bool TrafficCounter::first_touch(u64 sector, Site site, bool stores) {
    if (2 * used_ >= table_.size()) grow();
    const u64 access = access_key(site, stores);
    for (u64 i = mix(access, sector);; i++) {
        Entry& entry = table_[i & (table_.size() - 1)];
        if (entry.block_number != block_number_) {
            entry = {access, sector, block_number_};
            used_++;
            return true;
        }
        if (entry.access == access && entry.sector == sector) return false;
    }
}

void TrafficCounter::grow() {
    std::vector<Entry> old(2 * table_.size());
    old.swap(table_);
    for (const Entry& entry : old) {
        if (entry.block_number != block_number_) continue;
        u64 i = mix(entry.access, entry.sector);
        while (table_[i & (table_.size() - 1)].block_number == block_number_) i++;
        table_[i & (table_.size() - 1)] = entry;
    }
}

void TrafficCounter::load(u64 address, u32 bytes, Site site) {
    traffic_->bytes_loaded += bytes;
    for (u64 s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; s++) {
        traffic_->sectors_loaded += first_touch(s, site, false);
    }
}

void TrafficCounter::store(u64 address, u32 bytes, Site site) {
    traffic_->bytes_stored += bytes;
    for (u64 s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; s++) {
        traffic_->sectors_stored += first_touch(s, site, true);
    }
}

}  // namespace ptx
