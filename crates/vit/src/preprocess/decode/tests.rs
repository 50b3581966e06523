use super::super::golden::{Tensors, bytes, noise};
use super::*;

fn open(name: &str) -> Result<Image> {
    Image::decode(&bytes(&format!("decode/{name}")), &DecodeLimits::default())
}

/// Largest difference and its mean between two pictures of one size.
fn difference(a: &Image, b: &Image) -> (u8, f64) {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let gaps: Vec<u8> = a.rgb().iter().zip(b.rgb()).map(|(x, y)| x.abs_diff(*y)).collect();
    let sum: f64 = gaps.iter().map(|&g| f64::from(g)).sum();
    (gaps.iter().copied().max().unwrap(), sum / gaps.len() as f64)
}

#[test]
fn lossless_files_decode_to_the_bytes_of_pillow() {
    let golden = Tensors::open("decode/rgb.safetensors");
    let mut files = 0;
    for name in golden.names() {
        let lossless = name.ends_with(".png") || name.starts_with("lossless") || name == "animated.webp";
        if lossless && name != "grey-16bit.png" {
            let image = open(&name).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(difference(&image, &golden.image(&name)).0, 0, "{name}");
            files += 1;
        }
    }
    assert_eq!(files, 16);
}

#[test]
fn lossy_files_decode_close_to_pillow() {
    let golden = Tensors::open("decode/rgb.safetensors");
    let mut files = 0;
    for name in golden.names() {
        if name.ends_with(".jpg") || name == "lossy.webp" {
            let image = open(&name).unwrap_or_else(|e| panic!("{name}: {e}"));
            let (most, mean) = difference(&image, &golden.image(&name));
            println!("{name}: at most {most}, mean {mean:.3}");
            assert!(most <= 4 && mean < 0.6, "{name}: at most {most}, mean {mean}");
            files += 1;
        }
    }
    assert_eq!(files, 16);
}

#[test]
fn sixteen_bit_grey_keeps_its_high_byte() {
    // Our documented difference: Pillow would clip all but the first few pixels to white.
    let image = open("grey-16bit.png").unwrap();
    let n = image.width() * image.height();
    for (i, pixel) in image.rgb().as_chunks::<3>().0.iter().enumerate() {
        assert_eq!(*pixel, [((i * 65535 / (n - 1)) >> 8) as u8; 3]);
    }
}

#[test]
fn limits_are_checked_before_decoding() {
    let file = bytes("decode/rgb.png");
    let message = |limits: DecodeLimits| Image::decode(&file, &limits).unwrap_err().to_string();
    let limits = DecodeLimits::default;
    assert_eq!(
        message(DecodeLimits { max_side: 25, ..limits() }),
        "picture limit: width must be at most 25, found 26"
    );
    assert_eq!(
        message(DecodeLimits { max_pixels: 493, ..limits() }),
        "picture limit: number of pixels must be at most 493, found 494"
    );
    assert_eq!(
        message(DecodeLimits { max_file_bytes: 9, ..limits() }),
        format!("picture limit: file size in bytes must be at most 9, found {}", file.len())
    );
    assert!(
        Image::decode(&file, &DecodeLimits { max_side: 26, max_pixels: 494, max_file_bytes: 1000 }).is_ok()
    );
}

#[test]
fn a_data_url_decodes_like_its_file() {
    let file = bytes("decode/rgb.png");
    let payload = base64::engine::general_purpose::STANDARD.encode(&file);
    let limits = DecodeLimits::default();
    let url = format!("data:image/png;base64,{payload}");
    assert_eq!(Image::decode_data_url(&url, &limits).unwrap(), open("rgb.png").unwrap());
    let unpadded = url.trim_end_matches('=');
    assert!(Image::decode_data_url(unpadded, &limits).is_ok());
    let (head, tail) = url.split_at(100);
    assert!(Image::decode_data_url(&format!("{head}\r\n {tail}\n"), &limits).is_ok());
}

#[test]
fn bad_data_urls_are_refused_with_a_reason() {
    let limits = DecodeLimits::default();
    let message = |url: &str| Image::decode_data_url(url, &limits).unwrap_err().to_string();
    assert_eq!(message("http://example.com/a.png"), "data url: must start with `data:image/`");
    assert_eq!(message("data:image/png;base64"), "data url: has no comma before the data");
    assert_eq!(message("data:image/png,abc"), "data url: must be marked `;base64` before the comma");
    assert!(message("data:image/png;base64,a?b").starts_with("data url: is not base64: "));
    assert_eq!(message("data:image/png;base64,"), "picture must be png, jpeg or webp, found no bytes");
    let small = DecodeLimits { max_file_bytes: 100, ..limits.clone() };
    let long = format!("data:image/png;base64,{}", "A".repeat(1000));
    assert!(matches!(
        Image::decode_data_url(&long, &small),
        Err(Error::Limit { limit: 100, found: 750, .. })
    ));
}

#[test]
fn other_formats_are_named_by_their_first_bytes() {
    let message = |b: &[u8]| Image::decode(b, &DecodeLimits::default()).unwrap_err().to_string();
    assert_eq!(message(b"GIF89a"), "picture must be png, jpeg or webp, found 47 49 46 38 39 61");
    assert_eq!(message(b""), "picture must be png, jpeg or webp, found no bytes");
}

#[test]
fn raw_pixels_must_fill_the_picture() {
    let image = noise(3, 5, 1);
    assert_eq!((image.width(), image.height(), image.rgb().len()), (5, 3, 45));
    for (w, h, n) in [(0, 0, 0), (5, 3, 44), (5, 3, 46), (usize::MAX, usize::MAX, 3), (0, 3, 0)] {
        assert!(Image::from_rgb8(w, h, vec![0; n]).is_err());
    }
}

const SAMPLES: [&str; 7] = [
    "rgb.png",
    "palette-2bit.png",
    "420.jpg",
    "progressive.jpg",
    "lossless-alpha.webp",
    "lossy.webp",
    "animated.webp",
];

#[test]
fn every_truncation_is_an_error_and_never_a_panic() {
    for name in SAMPLES {
        let file = bytes(&format!("decode/{name}"));
        let whole = open(name).unwrap();
        for len in 0..file.len() {
            match Image::decode(&file[..len], &DecodeLimits::default()) {
                // Bytes after the last pixel (checksums, the end marker, a second frame) may be missing.
                Ok(image) => assert_eq!(image, whole, "{name} cut at {len}"),
                Err(e) => assert!(!e.to_string().contains("panicked"), "{name} cut at {len}: {e}"),
            }
        }
        assert!(Image::decode(&file[..file.len() / 2], &DecodeLimits::default()).is_err(), "{name}");
    }
}

#[test]
fn thousands_of_mutated_files_give_a_picture_or_a_typed_error() {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut pictures, mut errors) = (0, 0);
    // A mutation may claim any size, so the limits keep the work of this test small.
    let limits = DecodeLimits { max_side: 4096, max_pixels: 1 << 20, max_file_bytes: 1 << 20 };
    for round in 0..3500 {
        let mut file = bytes(&format!("decode/{}", SAMPLES[round % SAMPLES.len()]));
        for _ in 0..1 + random() % 4 {
            let at = random() as usize % file.len();
            match random() % 4 {
                0 => file[at] = random() as u8,
                1 => file[at] ^= 1 << (random() % 8),
                2 => drop(file.remove(at)),
                _ => file.insert(at, [0, 0xff, 0x80, random() as u8][random() as usize % 4]),
            }
        }
        match Image::decode(&file, &limits) {
            Ok(image) => {
                assert_eq!(image.rgb().len(), image.width() * image.height() * 3);
                pictures += 1;
            }
            Err(e) => {
                assert!(!e.to_string().contains("panicked"), "round {round}: {e}");
                errors += 1;
            }
        }
    }
    assert!(pictures > 100 && errors > 100, "{pictures} pictures, {errors} errors");
}
