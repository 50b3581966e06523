//! Chat templates.
//!
//! A template comes from a file, so it is a program of a stranger. The parser is that of `minijinja`; the
//! evaluator is our own, because every byte a template creates and every node it evaluates must be paid from a
//! budget before it happens, and because numbers, booleans, lists and `tojson` must print as Python prints them.
//!
//! Left out, each with a typed error: template inheritance and imports, `call` and `filter` blocks, recursive
//! loops, argument splats, the `generation` tag, and functions of the clock.

mod builtins;
mod eval;
mod json;
mod value;

use minijinja::machinery::{Token, ast, parse, tokenize};
use minijinja::syntax::SyntaxConfig;

use crate::error::{Error, Result, check_max, clip};
use crate::limits;
use crate::message::{Content, ContentFormat, Message, Part};
use crate::placeholder::Placeholders;
use value::Value;

/// A chat template that parses.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
}

/// Settings of one rendering.
#[derive(Debug, Clone)]
pub struct RenderOptions {
    /// Append the opening of a reply.
    pub add_generation_prompt: bool,
    /// How message content reaches the template.
    pub format: ContentFormat,
    /// Placeholder texts for [`ContentFormat::String`].
    pub placeholders: Placeholders,
    /// Texts that no message may contain, because only the program may write them. By default the placeholders
    /// of images and videos; a caller whose users are not trusted adds the role tokens.
    pub reserved: Vec<String>,
    /// Further variables, such as `bos_token`, `eos_token`, `tools` or `enable_thinking`.
    pub variables: Vec<(String, serde_json::Value)>,
}

impl Default for RenderOptions {
    fn default() -> Self {
        let placeholders = Placeholders::default();
        Self {
            add_generation_prompt: true,
            format: ContentFormat::default(),
            reserved: vec![placeholders.image.clone(), placeholders.video.clone()],
            placeholders,
            variables: Vec::new(),
        }
    }
}

impl ChatTemplate {
    /// Takes the text of a template, such as that of `chat_template.jinja`, and checks its syntax.
    pub fn new(source: &str) -> Result<Self> {
        check_max("chat template bytes", limits::MAX_TEMPLATE_BYTES, source.len())?;
        check_tokens(source)?;
        parse_source(source)?;
        Ok(Self { source: source.to_owned() })
    }

    /// The text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation. The text is to be encoded as it is, without adding special tokens.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        check_reserved(messages, &options.reserved)?;
        let (root, input) = root_variables(messages, options)?;
        let tree = parse_source(&self.source)?;
        eval::render(&tree, root, input)
    }
}

fn syntax() -> Result<SyntaxConfig> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| syntax_error(&e))
}

fn syntax_error(e: &minijinja::Error) -> Error {
    let detail = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    Error::TemplateSyntax { line: e.line().unwrap_or(0), detail: clip(&detail, 160) }
}

fn parse_source(source: &str) -> Result<ast::Stmt<'_>> {
    parse(source, "chat_template", syntax()?).map_err(|e| syntax_error(&e))
}

/// Bounds what the parser recurses over without counting: long operator chains and `elif` ladders.
fn check_tokens(source: &str) -> Result<()> {
    let (mut in_tag, mut first, mut elifs) = (0usize, false, 0usize);
    for token in tokenize(source, false, syntax()?) {
        let (token, _) = token.map_err(|e| syntax_error(&e))?;
        match token {
            Token::VariableStart | Token::BlockStart => {
                in_tag = 0;
                first = true;
                continue;
            }
            Token::Ident("elif") if first => {
                elifs += 1;
                check_max("chat template elif branches", limits::MAX_TEMPLATE_ELIFS, elifs)?;
            }
            Token::TemplateData(_) => continue,
            _ => {}
        }
        first = false;
        in_tag += 1;
        check_max("tokens in one chat template tag", limits::MAX_TEMPLATE_TAG_TOKENS, in_tag)?;
    }
    Ok(())
}

fn check_reserved(messages: &[Message], reserved: &[String]) -> Result<()> {
    for (index, message) in messages.iter().enumerate() {
        for text in message.texts().chain(message.metadata.as_deref()) {
            for token in reserved.iter().filter(|t| !t.is_empty()) {
                if let Some(offset) = text.find(token.as_str()) {
                    return Err(Error::ReservedText { message: index, token: token.clone(), offset });
                }
            }
        }
    }
    Ok(())
}

/// The variables that the template sees, and the number of bytes of text in them.
fn root_variables(messages: &[Message], options: &RenderOptions) -> Result<(Vec<(String, Value)>, usize)> {
    let invalid = |detail: String| Error::TemplateRender { line: 0, detail };
    let mut list = Vec::with_capacity(messages.len());
    let mut input = 0usize;
    for (index, message) in messages.iter().enumerate() {
        let content = match (&message.content, options.format) {
            (Content::Text(text), _) => Value::str(text),
            (Content::Parts(parts), ContentFormat::Hf) => {
                let parts = parts.iter().map(part_value).collect::<std::result::Result<Vec<_>, _>>();
                parts.and_then(|p| Value::list(p, false)).map_err(invalid)?
            }
            (Content::Parts(_), ContentFormat::String) => {
                let names = &options.placeholders;
                Value::str(&message.joined(index, &names.one_image(), &names.one_video())?)
            }
        };
        let mut entries = vec![("role".into(), Value::str(&message.role)), ("content".into(), content)];
        if let Some(metadata) = &message.metadata {
            entries.push(("metadata".into(), Value::str(metadata)));
        }
        // The constant is for the message itself, so that very many empty ones count too.
        input += 64 + message.role.len() + message.metadata.as_ref().map_or(0, String::len);
        input += message.texts().map(str::len).sum::<usize>();
        check_max("chat template input bytes", limits::MAX_TEMPLATE_INPUT_BYTES, input)?;
        list.push(Value::map(entries).map_err(invalid)?);
    }
    let mut root = vec![
        ("messages".to_owned(), Value::list(list, false).map_err(invalid)?),
        ("add_generation_prompt".to_owned(), Value::Bool(options.add_generation_prompt)),
        // The reference always defines these two.
        ("tools".to_owned(), Value::None),
        ("documents".to_owned(), Value::None),
    ];
    for (name, json) in &options.variables {
        let value = Value::from_json(json).map_err(invalid)?;
        input = input.saturating_add(usize::try_from(value.weight()).unwrap_or(usize::MAX));
        check_max("chat template input bytes", limits::MAX_TEMPLATE_INPUT_BYTES, input)?;
        root.push((name.clone(), value));
    }
    Ok((root, input))
}

fn part_value(part: &Part) -> std::result::Result<Value, String> {
    let mut entries = vec![("type".into(), Value::str(part.kind()))];
    if let Part::Text(text) = part {
        entries.push(("text".into(), Value::str(text)));
    }
    Value::map(entries)
}

/// The template in a `tokenizer_config.json`: its `chat_template`, either a text or a list of
/// `{"name", "template"}` of which the one named `default` is taken. `None` when the file has none.
pub fn template_from_config(json: &[u8]) -> Result<Option<String>> {
    const FILE: &str = "tokenizer_config.json";
    /// The rest of the file is skipped, so that it cannot cost memory.
    #[derive(serde::Deserialize)]
    struct Config {
        chat_template: Option<Templates>,
    }
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Templates {
        One(String),
        Named(Vec<Named>),
    }
    #[derive(serde::Deserialize)]
    struct Named {
        name: String,
        template: String,
    }
    check_max("tokenizer_config.json bytes", limits::MAX_JSON_BYTES / 4, json.len())?;
    let config: Config = serde_json::from_slice(json).map_err(|e| Error::json(FILE, &e))?;
    match config.chat_template {
        None => Ok(None),
        Some(Templates::One(text)) => Ok(Some(text)),
        Some(Templates::Named(list)) => match list.into_iter().find(|t| t.name == "default") {
            Some(t) => Ok(Some(t.template)),
            None => Err(Error::Missing { file: FILE, field: "chat_template[name = default]".into() }),
        },
    }
}
