//! Declared caps. Real files stay far below them; they bound the memory and time that a hostile one can cost.

/// Largest `tokenizer.json` that is read, in bytes (real: 20 MB).
pub const MAX_JSON_BYTES: usize = 64 << 20;
/// Largest tables of a tokenizer that are made or opened, in bytes (real: about 10 MB).
pub const MAX_TABLES_BYTES: usize = 64 << 20;
/// Exclusive upper bound of token ids, and so of the number of tokens (real: 151,552).
pub const MAX_TOKEN_ID: u32 = 1 << 20;
/// Largest number of merges (real: 318,088).
pub const MAX_MERGES: usize = 1 << 21;
/// Longest single token in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;
/// Largest number of added tokens.
pub const MAX_ADDED_TOKENS: usize = 1 << 14;
/// Longest added token in bytes.
pub const MAX_ADDED_TOKEN_BYTES: usize = 256;
/// Largest total length of the added tokens in bytes; bounds the size of the matcher.
pub const MAX_ADDED_BYTES: usize = 1 << 18;
/// Largest number of steps in a pre-tokenizer sequence.
pub const MAX_SPLIT_STEPS: usize = 8;
/// Longest split pattern in bytes.
pub const MAX_PATTERN_BYTES: usize = 4096;
/// Longest text that one `encode` call takes, in bytes.
pub const MAX_TEXT_BYTES: usize = 64 << 20;
/// Longest stretch between added tokens that a pattern without a hand-written scanner is applied to, in bytes.
pub const MAX_REGEX_BYTES: usize = 16 << 10;
/// Backtracking steps allowed in one search by such a pattern. A step can look at the whole stretch, so that this
/// times [`MAX_REGEX_BYTES`] bounds the work.
pub const MAX_REGEX_BACKTRACKS: usize = 10_000;
/// Wall-clock budget of one `encode` call for such patterns, in milliseconds.
pub const MAX_REGEX_MILLIS: u64 = 1000;
/// Largest number of stop strings.
pub const MAX_STOP_STRINGS: usize = 64;
/// Longest stop string in bytes; also bounds the text that is held back.
pub const MAX_STOP_BYTES: usize = 1024;
/// Longest chat template in bytes (real: 1 to 10 KB).
pub const MAX_TEMPLATE_BYTES: usize = 128 << 10;
/// Most tokens of template syntax inside one `{{ }}` or `{% %}`.
pub const MAX_TEMPLATE_TAG_TOKENS: usize = 1000;
/// Most `elif` branches in one template.
pub const MAX_TEMPLATE_ELIFS: usize = 128;
/// Deepest nesting of template statements, expressions and macro calls while rendering.
pub const MAX_TEMPLATE_DEPTH: usize = 96;
/// Deepest nesting of lists and maps that a template sees or builds.
pub const MAX_VALUE_DEPTH: u32 = 32;
/// Most text bytes in the messages and variables of one rendering.
pub const MAX_TEMPLATE_INPUT_BYTES: usize = 4 << 20;
/// Longest rendered prompt in bytes.
pub const MAX_TEMPLATE_OUTPUT_BYTES: usize = 16 << 20;
/// Fuel of one rendering before the share of the input is added: one unit per byte created and
/// [`TEMPLATE_STEP_FUEL`] per syntax node evaluated. Bounds both time and memory.
pub const TEMPLATE_BASE_FUEL: u64 = 64 << 20;
/// Fuel per byte of input.
pub const TEMPLATE_FUEL_PER_INPUT_BYTE: u64 = 16;
/// Fuel for one syntax node.
pub const TEMPLATE_STEP_FUEL: u64 = 64;
/// Longest prompt after placeholders are expanded, in bytes.
pub const MAX_EXPANDED_BYTES: usize = 64 << 20;
