#include "traffic.h"

#include <algorithm>

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

TrafficCounter::Entry& TrafficCounter::entry_of(u64 access, u64 sector) {
    if (2 * used_ >= table_.size()) grow();
    for (u64 i = mix(access, sector);; i++) {
        Entry& entry = table_[i & (table_.size() - 1)];
        if (entry.block_number != block_number_) {
            entry = {access, sector, block_number_, 0};
            used_++;
            return entry;
        }
        if (entry.access == access && entry.sector == sector) return entry;
    }
}

void TrafficCounter::touch(u64 address, u32 bytes, Site site, bool stores, u64& sectors,
                           u64& distinct_bytes) {
    const u64 access = access_key(site, stores);
    const u64 end = address + bytes;
    for (u64 sector = address / kSectorBytes; sector * kSectorBytes < end; sector++) {
        const u64 begin_of_sector = sector * kSectorBytes;
        const u64 first = std::max(address, begin_of_sector) - begin_of_sector;
        const u64 last = std::min(end, begin_of_sector + kSectorBytes) - begin_of_sector;
        const u32 touched = static_cast<u32>((u64(1) << last) - (u64(1) << first));
        Entry& entry = entry_of(access, sector);
        sectors += entry.bytes == 0;
        distinct_bytes += __builtin_popcount(touched & ~entry.bytes);
        entry.bytes |= touched;
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
    touch(address, bytes, site, false, traffic_->sectors_loaded, traffic_->distinct_loaded);
}

void TrafficCounter::store(u64 address, u32 bytes, Site site) {
    traffic_->bytes_stored += bytes;
    touch(address, bytes, site, true, traffic_->sectors_stored, traffic_->distinct_stored);
}

}  // namespace ptx
