//! Pictures made to hurt: each must give a picture or a typed error, soon, within the declared memory.
//!
//! The memory is counted by this test program's allocator, for each thread: decoding starts none.

#![allow(clippy::unwrap_used, reason = "a test: what fails is a failed test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use pocketglm_vit::preprocess::{DecodeLimits, Image};
use pocketglm_vit::{Error, Result};

/// The system's allocator, with a count of the bytes that each thread has in use and of their peak.
struct Counting;

thread_local! {
    static IN_USE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = IN_USE.try_with(|in_use| {
        in_use.set(in_use.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(in_use.get())));
    });
}

// SAFETY: every call goes to `System` with the caller's arguments; the counters touch no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result of decoding, with the bytes that it took at most.
fn decode(what: &str, file: &[u8], limits: &DecodeLimits) -> (Result<Image>, usize) {
    let before = IN_USE.get();
    PEAK.set(before);
    let start = Instant::now();
    let result = Image::decode(file, limits);
    let (took, used) = (start.elapsed(), (PEAK.get() - before) as usize);
    eprintln!("{what}: {used} bytes, {took:?}, {:?}", result.as_ref().map(|i| (i.width(), i.height())));
    // Two seconds on a free machine; tests run on busy ones.
    assert!(took < Duration::from_secs(10), "{what} took {took:?}");
    assert!(used as u64 <= limits.max_memory(), "{what} took {used} bytes");
    if let Err(e) = &result {
        assert!(!e.to_string().contains("panicked"), "{what}: {e}");
    }
    (result, used)
}

fn sample(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../../tests/golden/decode/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &b: &u8| {
        (0..8).fold(crc ^ u32::from(b), |c, _| (c >> 1) ^ if c & 1 == 1 { 0xEDB8_8320 } else { 0 })
    };
    !bytes.iter().fold(!0, step)
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let checked = [&kind[..], data].concat();
    [&(data.len() as u32).to_be_bytes()[..], &checked, &crc32(&checked).to_be_bytes()].concat()
}

/// `rgb.png` with another size in its header and further chunks before the pixels.
fn png(width: u32, height: u32, bits: u8, color: u8, extra: &[u8]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[bits, color, 0, 0, 0]].concat();
    let file = sample("rgb.png");
    [&file[..8], &chunk(b"IHDR", &header), extra, &file[33..]].concat()
}

/// A zlib stream of a few megabytes that becomes `len` bytes: one zero, then copies of the 258 bytes before.
fn zlib_bomb(len: usize) -> Vec<u8> {
    let mut out = vec![0x78, 0x01];
    let (mut bits, mut count) = (0u64, 0);
    let mut put = |value: u64, n: u32| {
        bits |= value << count;
        count += n;
        while count >= 8 {
            out.push(bits as u8);
            bits >>= 8;
            count -= 8;
        }
    };
    put(0b011, 3); // last block, fixed codes
    put(u64::from(0b0011_0000u8.reverse_bits()), 8); // the byte 0
    for _ in 0..len / 258 {
        put(u64::from(0b1100_0101u8.reverse_bits()), 8); // 258 bytes
        put(0, 5); // from 1 byte before
    }
    put(0, 7 + 7); // the end, then padding
    out
}

#[test]
fn a_tiny_png_that_claims_gigabytes_is_refused_without_allocating() {
    let file = &png(65_535, 65_535, 8, 2, b"")[..65];
    let (result, used) = decode("tiny png", file, &DecodeLimits::default());
    assert!(matches!(result, Err(Error::Limit { what: "width", found: 65_535, .. })), "{result:?}");
    assert!(used < 10_000, "{used}");
}

#[test]
fn compressed_metadata_is_not_blown_up() {
    let bomb = zlib_bomb(1 << 30);
    assert!(bomb.len() < 8 << 20);
    for (kind, prefix) in
        [(b"zTXt", &b"Raw profile type exif\0\0"[..]), (b"iTXt", b"k\0\x01\0\0\0"), (b"iCCP", b"icc\0\0")]
    {
        let file = png(26, 19, 8, 2, &chunk(kind, &[prefix, &bomb].concat()));
        let (result, used) = decode(&String::from_utf8_lossy(kind), &file, &DecodeLimits::default());
        assert!(used < 40 << 20, "{used}");
        if let Ok(image) = result {
            assert_eq!((image.width(), image.height()), (26, 19));
        }
    }
}

#[test]
fn headers_just_within_the_limits_stay_within_the_declared_memory() {
    // Side 7000: 49 million pixels, the data of 26x19.
    let limits = DecodeLimits::default();
    let side = 7000u16;
    let mut files =
        vec![("png rgba16", png(7000, 7000, 16, 6, b"")), ("png grey1", png(7000, 7000, 1, 0, b""))];
    for name in ["420.jpg", "progressive.jpg", "cmyk.jpg"] {
        let mut file = sample(name);
        let frame = file.windows(2).position(|w| w == [0xff, 0xc0] || w == [0xff, 0xc2]).unwrap();
        file[frame + 5..frame + 7].copy_from_slice(&side.to_be_bytes());
        file[frame + 7..frame + 9].copy_from_slice(&side.to_be_bytes());
        files.push((name, file));
    }
    for name in ["lossy.webp", "lossless.webp", "lossless-alpha.webp", "animated.webp"] {
        let mut file = sample(name);
        let at = |kind: &[u8]| file.windows(4).position(|w| w == kind);
        let canvas = at(b"VP8X").map(|at| at + 12);
        let frame = at(b"ANMF").map(|at| at + 14);
        let (lossy, lossless) = (at(b"VP8 ").map(|at| at + 14), at(b"VP8L").map(|at| at + 9));
        for at in canvas.into_iter().chain(frame) {
            for i in [0, 3] {
                file[at + i..at + i + 2].copy_from_slice(&(side - 1).to_le_bytes());
            }
        }
        if let Some(at) = lossy {
            file[at..at + 2].copy_from_slice(&side.to_le_bytes());
            file[at + 2..at + 4].copy_from_slice(&side.to_le_bytes());
        }
        if let Some(at) = lossless {
            let flags = u32::from(file[at + 3]) >> 4 << 28;
            let size = u32::from(side - 1) | u32::from(side - 1) << 14 | flags;
            file[at..at + 4].copy_from_slice(&size.to_le_bytes());
        }
        files.push((name, file));
    }
    for (name, file) in &files {
        let (result, used) = decode(name, file, &limits);
        // The header was believed, so the decoder did start, except where pixels are missing at once.
        assert!(result.is_ok() || matches!(result, Err(Error::Decode { .. })), "{name}: {result:?}");
        assert!(used as u64 <= 16 * 49_000_000 + (16 << 20), "{name}: {used}");
        let small = DecodeLimits { max_pixels: 48_999_999, ..DecodeLimits::default() };
        let (result, used) = decode(name, file, &small);
        assert!(matches!(result, Err(Error::Limit { found: 49_000_000, .. })), "{name}: {result:?}");
        assert!(used < 10_000, "{name}: {used}");
    }
}

#[test]
fn a_webp_chunk_longer_than_its_file_is_refused_without_allocating() {
    let mut file = sample("lossless-orientation-8.webp");
    let at = file.windows(4).position(|w| w == b"EXIF").unwrap() + 4;
    file[at..at + 4].copy_from_slice(&0xFFFF_FFF0u32.to_le_bytes());
    let (result, used) = decode("webp exif", &file, &DecodeLimits::default());
    assert!(matches!(result, Err(Error::Decode { format: "webp", .. })), "{result:?}");
    assert!(used < 10_000, "{used}");
}

#[test]
fn a_webp_frame_larger_than_its_canvas_is_refused_without_allocating() {
    let mut file = sample("lossless-orientation-8.webp");
    let at = file.windows(4).position(|w| w == b"VP8L").unwrap() + 9;
    file[at..at + 4].copy_from_slice(&0x0FFF_FFFFu32.to_le_bytes());
    let (result, used) = decode("webp frame", &file, &DecodeLimits::default());
    assert!(matches!(result, Err(Error::Limit { what: "number of pixels", .. })), "{result:?}");
    assert!(used < 10_000, "{used}");
}

#[test]
fn pictures_without_pixels_are_refused() {
    let limits = DecodeLimits::default();
    for (w, h) in [(0, 19), (26, 0), (0, 0)] {
        assert!(matches!(decode("empty png", &png(w, h, 8, 2, b""), &limits).0, Err(Error::Size { .. })));
    }
    let mut file = sample("420.jpg");
    let frame = file.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    file[frame + 5..frame + 7].fill(0);
    assert!(matches!(decode("empty jpeg", &file, &limits).0, Err(Error::Size { .. })));
    let mut file = sample("lossy.webp");
    file[26..28].fill(0);
    assert!(matches!(decode("empty webp", &file, &limits).0, Err(Error::Size { .. })));
}

#[test]
fn a_jpeg_with_very_many_scans_is_refused() {
    let mut file = sample("progressive.jpg");
    let frame = file.windows(2).position(|w| w == [0xff, 0xc2]).unwrap();
    file[frame + 5..frame + 9].copy_from_slice(&[0x1b, 0x58, 0x1b, 0x58]);
    let scan = file.windows(2).rposition(|w| w == [0xff, 0xda]).unwrap();
    let last = file[scan..file.len() - 2].to_vec();
    file.truncate(file.len() - 2);
    for _ in 0..100 {
        file.extend_from_slice(&last);
    }
    file.extend_from_slice(&[0xff, 0xd9]);
    let (result, _) = decode("scans", &file, &DecodeLimits::default());
    assert!(matches!(result, Err(Error::Limit { what: "jpeg scans times pixels", .. })), "{result:?}");
}
