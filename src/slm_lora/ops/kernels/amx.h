// The tile registers of AMX.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t TILE = 16;  // rows of a tile register, and 32-bit words per row

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

// Configures the eight tile registers of this thread, and releases them on destruction.
struct AmxState {
    AmxState() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~AmxState() { _tile_release(); }
    AmxState(const AmxState&) = delete;
};

}  // namespace
