//! The reference's options, as its checkpoints keep them under `args`, to keys of a recipe and back.

use anyhow::{Context as _, Result, bail};
use checkpoint::pth::Value;
use recipe::Recipe;

use crate::weights::text;

/// Options and the keys that say the same, of the network first (SPEC of the reference, section 14).
///
/// `nb_classes` and `drop_path` are not among them: they never reach the reference's network.
const KEYS: [(&str, &str); 33] = [
    ("model", "model.name"),
    ("input_size", "model.input_size"),
    ("depth_factor", "model.depth_factor"),
    ("SA_widening_factor", "model.sa_widening_factor"),
    ("spatial_reduction", "model.spatial_reduction"),
    ("with_last_CA", "model.with_last_ca"),
    ("with_x2z", "model.with_x2z"),
    ("with_z2x", "model.with_z2x"),
    ("with_dwc", "model.with_dwc"),
    ("with_isc", "model.with_isc"),
    ("dropout", "model.dropout"),
    ("num_SA_heads", "model.num_sa_heads"),
    ("num_latent_channels", "model.num_latent_channels"),
    ("loss_cnn_factor", "loss.cnn_factor"),
    ("loss_att_factor", "loss.att_factor"),
    ("loss_merge_factor", "loss.merge_factor"),
    ("smoothing", "loss.smoothing"),
    ("with_kd", "loss.with_kd"),
    ("T_kd", "loss.t_kd"),
    ("alpha_kd", "loss.alpha_kd"),
    ("weight_decay", "optimizer.weight_decay"),
    ("weight_decay_end", "optimizer.weight_decay_end"),
    ("opt_eps", "optimizer.eps"),
    ("opt_betas", "optimizer.betas"),
    ("clip_grad", "optimizer.clip_grad"),
    ("lr", "schedule.lr"),
    ("min_lr", "schedule.min_lr"),
    ("warmup_epochs", "schedule.warmup_epochs"),
    ("model_ema_decay", "ema.decay"),
    ("epochs", "epochs"),
    ("batch_size", "batch_size"),
    ("update_freq", "update_freq"),
    ("seed", "seed"),
];

/// The recipe that a checkpoint's options say; what they do not say is as in the published recipes.
///
/// `classes` are those of the weights, and `sets` are laid over all.
pub(super) fn recipe(args: &Value, classes: Option<u64>, sets: &[String]) -> Result<Recipe> {
    let says_model = sets.iter().any(|set| set.starts_with("model.name="));
    if args.get("model").is_none() && !says_model {
        bail!("no args in it name its model; say it with --recipe, or --set model.name=NAME");
    }
    let mut tree = toml::Table::new();
    for (option, key) in KEYS {
        let Some(value) = args.get(option) else { continue };
        let value = plain(value).with_context(|| format!("its args.{option} is {value:?}"))?;
        if let Some(value) = value {
            insert(&mut tree, key, value);
        }
    }
    if let Some(classes) = classes.and_then(|classes| i64::try_from(classes).ok()) {
        insert(&mut tree, "model.classes", classes.into());
    }
    Ok(Recipe::from_toml("that its args make", &toml::to_string(&tree)?, sets)?)
}

/// What of a recipe the reference has options for.
pub(super) fn of(recipe: &Recipe) -> Vec<(Value, Value)> {
    let tree = toml::Table::try_from(recipe).expect("a recipe holds only plain values");
    let at = |key: &str| {
        let (section, name) = key.split_once('.').unwrap_or(("", key));
        match section {
            "" => tree.get(name),
            section => tree.get(section)?.get(name),
        }
    };
    let pair = |(option, key): &(&str, &str)| Some((text(option), value(at(key)?)?));
    KEYS.iter().filter_map(pair).collect()
}

fn insert(tree: &mut toml::Table, key: &str, value: toml::Value) {
    let Some((section, name)) = key.split_once('.') else {
        tree.insert(key.to_owned(), value);
        return;
    };
    let section = tree.entry(section).or_insert_with(|| toml::Table::new().into());
    let section = section.as_table_mut().expect("no key is a section too");
    section.insert(name.to_owned(), value);
}

/// A value as a recipe holds it; nothing for an option that is not set.
fn plain(value: &Value) -> Result<Option<toml::Value>> {
    Ok(Some(match value {
        Value::None => return Ok(None),
        Value::Bool(value) => (*value).into(),
        Value::Int(value) => (*value).into(),
        Value::Float(value) => (*value).into(),
        Value::Text(text) => text.clone().into(),
        Value::List(items) => {
            let items = items.iter().filter_map(|item| plain(item).transpose());
            items.collect::<Result<Vec<toml::Value>>>()?.into()
        }
        Value::Bytes(_) | Value::Dict(_) | Value::Array(_) => bail!("no recipe holds such a value"),
    }))
}

fn value(plain: &toml::Value) -> Option<Value> {
    Some(match plain {
        toml::Value::String(text) => Value::Text(text.clone()),
        toml::Value::Integer(value) => Value::Int(*value),
        toml::Value::Float(value) => Value::Float(*value),
        toml::Value::Boolean(value) => Value::Bool(*value),
        toml::Value::Array(items) => Value::List(items.iter().map(value).collect::<Option<_>>()?),
        toml::Value::Datetime(_) | toml::Value::Table(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_survives_being_written_as_options() {
        let sets = ["model.name=resnet18_perceiver_t128", "loss.t_kd=4", "schedule.lr=6e-4"];
        let sets = sets.map(str::to_owned);
        let recipe_before = recipe::built_in("digits", &sets).unwrap();
        let after = recipe(&Value::Dict(of(&recipe_before)), Some(10), &[]).unwrap();
        assert_eq!(after.model, recipe_before.model);
        assert_eq!(after.loss, recipe_before.loss);
        assert_eq!(after.schedule, recipe_before.schedule);
        assert_eq!(after.ema, recipe_before.ema);
    }

    #[test]
    fn options_that_are_unset_unknown_or_wrong_are_told_apart() {
        let args = |items: &[(&str, Value)]| {
            Value::Dict(items.iter().map(|(key, value)| (text(key), value.clone())).collect())
        };
        let name = || ("model", text("reg400m_perceiver_t32"));
        let unset = args(&[name(), ("clip_grad", Value::None), ("wandb", Value::Bool(true))]);
        assert_eq!(recipe(&unset, None, &[]).unwrap().optimizer.clip_grad, None);
        let wrong = args(&[name(), ("lr", Value::Dict(Vec::new()))]);
        assert!(recipe(&wrong, None, &[]).unwrap_err().to_string().contains("args.lr"));
        let nameless = args(&[("lr", Value::Float(0.1))]);
        assert!(recipe(&nameless, None, &[]).unwrap_err().to_string().contains("--recipe"));
    }
}
