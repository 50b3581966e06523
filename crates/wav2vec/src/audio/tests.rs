use std::f64::consts::TAU;
use std::time::Instant;

use hound::{SampleFormat, WavSpec, WavWriter};

use super::*;

fn spec(channels: u16, rate: u32, bits: u16, float: bool) -> WavSpec {
    let sample_format = if float { SampleFormat::Float } else { SampleFormat::Int };
    WavSpec { channels, sample_rate: rate, bits_per_sample: bits, sample_format }
}

fn tone(hertz: f64, rate: u32, seconds: f64) -> Vec<f32> {
    let n = (f64::from(rate) * seconds) as usize;
    (0..n).map(|i| (0.5 * (TAU * hertz * i as f64 / f64::from(rate)).sin()) as f32).collect()
}

/// A file of these samples in -1..1.
fn wav(spec: WavSpec, samples: &[f32]) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    let mut writer = WavWriter::new(&mut file, spec).unwrap();
    for &v in samples {
        match spec.sample_format {
            SampleFormat::Float => writer.write_sample(v).unwrap(),
            SampleFormat::Int => {
                let full = ((1i64 << (spec.bits_per_sample - 1)) - 1) as f32;
                writer.write_sample((v * full) as i32).unwrap();
            }
        }
    }
    writer.finalize().unwrap();
    file.into_inner()
}

fn decode(bytes: &[u8]) -> Result<Clip> {
    Clip::decode_wav(bytes, &AudioLimits::default())
}

fn error(bytes: &[u8]) -> String {
    decode(bytes).unwrap_err().to_string()
}

/// Root of the mean of squares of what is left when the best fitting tone is taken away, relative to the tone.
fn residue(samples: &[f32], hertz: f64) -> f64 {
    let angle = |i: usize| TAU * hertz * i as f64 / f64::from(SAMPLE_RATE);
    let n = samples.len() as f64;
    let dot = |f: &dyn Fn(f64) -> f64| -> f64 {
        samples.iter().enumerate().map(|(i, &v)| f64::from(v) * f(angle(i))).sum::<f64>() * 2.0 / n
    };
    let (a, b) = (dot(&f64::sin), dot(&f64::cos));
    let rest: f64 = samples
        .iter()
        .enumerate()
        .map(|(i, &v)| (f64::from(v) - a * angle(i).sin() - b * angle(i).cos()).powi(2))
        .sum();
    (rest / n).sqrt() / (a * a + b * b).sqrt() * std::f64::consts::SQRT_2
}

#[test]
fn every_kind_of_sample_is_read() {
    let wanted = tone(440.0, SAMPLE_RATE, 0.1);
    for (bits, float, close) in
        [(8, false, 2e-2), (16, false, 1e-4), (24, false, 1e-6), (32, false, 1e-6), (32, true, 0.0)]
    {
        let clip = decode(&wav(spec(1, SAMPLE_RATE, bits, float), &wanted)).unwrap();
        assert_eq!(clip.samples().len(), wanted.len());
        for (got, wanted) in clip.samples().iter().zip(&wanted) {
            assert!((got - wanted).abs() <= close, "{bits} bits: {got}, wanted {wanted}");
        }
    }
}

#[test]
fn channels_are_averaged() {
    let stereo: Vec<f32> = tone(300.0, SAMPLE_RATE, 0.05).iter().flat_map(|&v| [v, 0.5 * v]).collect();
    let clip = decode(&wav(spec(2, SAMPLE_RATE, 32, true), &stereo)).unwrap();
    for (got, wanted) in clip.samples().iter().zip(tone(300.0, SAMPLE_RATE, 0.05)) {
        assert!((got - 0.75 * wanted).abs() < 1e-6);
    }
}

#[test]
fn a_tone_keeps_its_pitch_its_length_and_its_purity_at_every_rate() {
    for rate in [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000, 44_101] {
        let frames = tone(1000.0, rate, 0.5);
        let clip = Clip::from_frames(&frames, 1, rate, &AudioLimits::default()).unwrap();
        let wanted = (frames.len() as u64 * 16_000).div_ceil(u64::from(rate)) as usize;
        assert_eq!(clip.samples().len(), wanted, "{rate} Hz");
        let middle = &clip.samples()[800..wanted - 800];
        let rest = residue(middle, 1000.0);
        assert!(rest < 1e-4, "{rate} Hz: residue {rest:.1e}");
        // The filter's delay was taken off: the phase is that of the original.
        let exact = tone(1000.0, SAMPLE_RATE, 0.5);
        let apart = middle.iter().zip(&exact[800..]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(apart < 0.11, "{rate} Hz: {apart}, more than half a sample late or early");
    }
}

#[test]
fn a_tone_above_eight_kilohertz_does_not_come_back_as_another_one() {
    let clip = Clip::from_frames(&tone(11_000.0, 48_000, 0.5), 1, 48_000, &AudioLimits::default()).unwrap();
    let loudest = clip.samples()[400..7600].iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(loudest < 5e-5, "{loudest}");
}

#[test]
fn blocks_of_any_size_resample_to_the_same_samples() {
    let frames = tone(700.0, 44_100, 0.3);
    let whole = Clip::from_frames(&frames, 1, 44_100, &AudioLimits::default()).unwrap();
    for size in [1, 7, 1000, 5000] {
        let mut resampler = Resampler::new(44_100).unwrap();
        let mut out = Vec::new();
        for part in frames.chunks(size) {
            resampler.push(part, &mut out).unwrap();
        }
        resampler.finish(&mut out).unwrap();
        assert_eq!(out, whole.samples(), "blocks of {size}");
    }
}

#[test]
fn input_values_have_zero_mean_and_unit_variance() {
    let clip = Clip::from_frames(&[0.5, 0.25, -0.25, 0.9], 1, SAMPLE_RATE, &AudioLimits::default()).unwrap();
    let values = clip.input_values(true);
    let mean: f32 = values.iter().sum::<f32>() / 4.0;
    let variance: f32 = values.iter().map(|v| v * v).sum::<f32>() / 4.0;
    assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5);
    assert_eq!(clip.input_values(false), clip.samples());
    let mut meter = LevelMeter::default();
    meter.push(&clip.samples()[..1]);
    meter.push(&clip.samples()[1..]);
    let (a, b) = (meter.level(), clip.level());
    assert!((a.mean - b.mean).abs() < 1e-12 && (a.variance - b.variance).abs() < 1e-12);
}

#[test]
fn base64_and_data_urls_are_read() {
    use base64::Engine as _;
    let bytes = wav(spec(1, SAMPLE_RATE, 16, false), &tone(200.0, SAMPLE_RATE, 0.02));
    let text = base64::engine::general_purpose::STANDARD.encode(&bytes);
    let limits = AudioLimits::default();
    let plain = decode(&bytes).unwrap();
    assert_eq!(Clip::decode_base64(&text, &limits).unwrap(), plain);
    assert_eq!(Clip::decode_base64(&format!("data:audio/wav;base64,{text}"), &limits).unwrap(), plain);
    assert!(matches!(Clip::decode_base64("data:image/png;base64,AA", &limits), Err(Error::DataUrl { .. })));
    assert!(matches!(Clip::decode_base64("!", &limits), Err(Error::DataUrl { .. })));
}

/// A good file, to be broken.
fn good() -> Vec<u8> {
    wav(spec(1, SAMPLE_RATE, 16, false), &[0.25; 800])
}

fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = good();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn headers_that_lie_are_refused_with_what_they_say() {
    assert!(error(b"").contains("the end of the file after 0 bytes"));
    assert!(error(b"RIFF").contains("the end of the file"));
    assert!(error(b"OggSxxxxxxxxxxxx").contains("RIFF .. WAVE"));
    assert!(error(&with(22, &0u16.to_le_bytes())).contains("number of channels must be 1 to 64, found 0"));
    assert!(error(&with(22, &60_000u16.to_le_bytes())).contains("number of channels"));
    assert!(error(&with(24, &0u32.to_le_bytes())).contains("sampling rate must be"));
    assert!(error(&with(24, &1_000_000_000u32.to_le_bytes())).contains("found 1000000000"));
    assert!(error(&with(34, &0u16.to_le_bytes())).contains("bits of a sample"));
    assert!(error(&with(32, &0u16.to_le_bytes())).contains("bytes of a frame"));
    assert!(error(&with(16, &u32::MAX.to_le_bytes())).contains("size of a chunk"));
    assert!(
        error(&with(40, &1_000_000u32.to_le_bytes()))
            .contains("size of the data chunk must be at most the 1600")
    );
    assert!(error(&with(40, &33u32.to_le_bytes())).contains("a multiple of 2 bytes"));
}

#[test]
fn a_day_declared_in_44_bytes_takes_no_memory() {
    let mut file = good()[..44].to_vec();
    let day = 24 * 3600 * 16_000 * 2u32;
    file[40..44].copy_from_slice(&day.to_le_bytes());
    let start = Instant::now();
    assert!(error(&file).contains("size of the data chunk"));
    assert!(start.elapsed().as_millis() < 100);
}

#[test]
fn audio_past_the_limits_is_refused() {
    let limits = AudioLimits { max_seconds: 1, max_file_bytes: 1 << 20 };
    let long = vec![0.0; 16_001];
    assert!(matches!(
        Clip::from_frames(&long, 1, SAMPLE_RATE, &limits),
        Err(Error::Limit { what: "length in seconds", limit: 1, found: 2 })
    ));
    let file = wav(spec(1, SAMPLE_RATE, 16, false), &long);
    assert!(matches!(Clip::decode_wav(&file, &limits), Err(Error::Limit { .. })));
    let small = AudioLimits { max_seconds: 100, max_file_bytes: 100 };
    assert!(matches!(Clip::decode_wav(&file, &small), Err(Error::Limit { what: "file size in bytes", .. })));
}

#[test]
fn frames_that_are_no_numbers_are_named() {
    let limits = AudioLimits::default();
    let wrong = Clip::from_frames(&[0.0, f32::NAN], 1, SAMPLE_RATE, &limits);
    assert!(matches!(wrong, Err(Error::NotFinite { index: 1, .. })));
    let file = wav(spec(2, 8000, 32, true), &[0.0, 0.1, 0.2, f32::INFINITY]);
    assert!(matches!(decode(&file), Err(Error::NotFinite { index: 3, .. })));
    for (channels, rate) in [(0, 16_000), (3, 16_000), (1, 0), (1, 999), (1, 1_000_000_000)] {
        let found = Clip::from_frames(&[0.0, 0.0], channels, rate, &limits);
        assert!(matches!(found, Err(Error::Format { .. })), "{channels} channels, {rate} Hz");
    }
    assert_eq!(Clip::from_frames(&[], 1, 8000, &limits).unwrap().samples(), &[0f32; 0]);
}

#[test]
fn chunks_that_are_not_ours_are_skipped_even_those_of_odd_size() {
    let file = good();
    let mut with_list = file[..12].to_vec();
    with_list.extend(b"LIST\x03\0\0\0abc\0");
    with_list.extend(&file[12..]);
    assert_eq!(decode(&with_list).unwrap(), decode(&file).unwrap());
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end.max(1)
    }
}

#[test]
fn a_thousand_mutated_files_give_audio_or_a_typed_error_in_bounded_time() {
    let limits = AudioLimits { max_seconds: 60, max_file_bytes: 1 << 20 };
    let samples: Vec<f32> = tone(500.0, 16_000, 0.05);
    let originals = [
        wav(spec(1, 16_000, 16, false), &samples),
        wav(spec(2, 44_100, 24, false), &samples),
        wav(spec(1, 8_000, 32, true), &samples),
        wav(spec(3, 48_000, 8, false), &samples[..798]),
    ];
    let mut random = Random(7);
    let (mut read, mut refused) = (0, 0);
    let start = Instant::now();
    for i in 0..1200 {
        let mut file = originals[i % 4].clone();
        for _ in 0..=random.below(4) {
            match random.below(4) {
                // The header is where it hurts.
                0 | 1 => {
                    let at = random.below(80.min(file.len()));
                    file[at] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)];
                }
                2 => {
                    let end = random.below(file.len()) + 1;
                    file.truncate(end);
                }
                _ => {
                    let at = random.below(file.len());
                    file.insert(at, random.below(256) as u8);
                }
            }
            if file.is_empty() {
                break;
            }
        }
        match Clip::decode_wav(&file, &limits) {
            Ok(clip) => {
                assert!(clip.seconds() <= 61.0 && clip.samples().iter().all(|v| v.is_finite()));
                read += 1;
            }
            Err(e) => {
                assert!(!e.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(read > 100 && refused > 300, "{read} read, {refused} refused");
    assert!(start.elapsed().as_secs() < 60);
}

#[test]
fn every_prefix_of_a_file_is_refused() {
    let file = good();
    for end in 0..file.len() {
        assert!(decode(&file[..end]).is_err(), "{end} bytes");
    }
    assert!(decode(&file).is_ok());
}
