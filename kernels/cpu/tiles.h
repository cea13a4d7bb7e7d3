// The matrix registers (AMX): whether they may be used, and their shapes.
#pragma once

#ifdef __AMX_TILE__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

constexpr int TILE_LINES = 16;       // lines of a tile
constexpr int TILE_LINE_BYTES = 64;  // bytes of a line

// The kernel grants a process the tile registers when asked.
inline bool amx_granted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// To stand before loads of tiles: compilers do not know that these read memory.
inline void written() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Eight tiles of 16 lines of 64 bytes while it lives, then what the thread had before (oneDNN remembers what it set).
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(&before_);
        configure(TILE_LINES);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

    // Gives tiles 0 to 4 (by custom the sums and the left factor) `lines` lines, the others all; clears all tiles.
    void configure(int lines) {
        if (lines == lines_) return;
        TileConfig config;
        config.palette = 1;
        std::fill_n(config.row_bytes, 8, TILE_LINE_BYTES);
        std::fill_n(config.rows, 8, TILE_LINES);
        std::fill_n(config.rows, 5, lines);
        _tile_loadconfig(&config);
        lines_ = lines;
    }

  private:
    TileConfig before_;
    int lines_ = 0;
};

#endif
