//! The instance actions: RunInstances and its kin, each instance a machine of the hypervisor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::gate::{Call, Fault};
use super::hypervisor::Machine;
use super::world::{ImageState, Instance, InstanceState};
use super::{Lab, flag, images, new_id, page, text, texts};
use crate::boot::config_drive::ConfigDrive;

/// Instances an account may have.
const QUOTA: usize = 20;
/// Longest UserData, decoded, in bytes.
const USER_DATA_LIMIT: usize = 16 << 10;

pub(super) fn run_instances(lab: &Arc<Lab>, call: &Call) -> Result<Value, Fault> {
    let refused = |code, why: &str| Err(Fault::new(code, why));
    let zone = call.parameters.get("Placement").and_then(|placement| placement["Zone"].as_str());
    let Some(zone) = zone.filter(|zone| zone.starts_with(&lab.config.region)) else {
        return refused("InvalidZone.MismatchRegion", "The zone is not one of the region.");
    };
    let count = call.parameters.get("InstanceCount").and_then(Value::as_u64).unwrap_or(1);
    let (name, token) = (text(call, "InstanceName"), text(call, "ClientToken"));
    if !(1..=100).contains(&count) {
        return refused("InvalidParameterValue", "InstanceCount goes from 1 to 100.");
    }
    if name.chars().count() > 60 {
        return refused("InvalidParameterValue.TooLarge", "InstanceName takes 60 characters.");
    }
    if token.len() > 64 || !token.is_ascii() {
        return refused("InvalidClientToken.TooLong", "ClientToken takes 64 ASCII characters.");
    }
    let user_data =
        BASE64_STANDARD.decode(text(call, "UserData")).ok().and_then(|data| String::from_utf8(data).ok());
    let Some(user_data) = user_data.filter(|data| data.len() <= USER_DATA_LIMIT) else {
        return refused("InvalidParameterValue", "UserData takes 16 KB of text in base64.");
    };
    let user_data = Some(user_data).filter(|data| !data.is_empty());
    let image_id = text(call, "ImageId");
    let mut ids = Vec::new();
    {
        let mut world = lab.world();
        let uses_token = !token.is_empty();
        if let Some(earlier) = world.client_tokens.get(token).filter(|_| uses_token) {
            return Ok(json!({"InstanceIdSet": earlier}));
        }
        if images::find(&world.images, image_id)?.state != ImageState::Normal {
            return refused("InvalidImageId.IncorrectState", "The image is not NORMAL.");
        }
        if world.instances.len() + crate::unit::to_usize(count) > QUOTA {
            return refused("InstancesQuotaLimitExceeded", "The account may have 20 instances.");
        }
        if flag(call, "DryRun") {
            return refused("DryRunOperation", "The request would have succeeded, but DryRun was set.");
        }
        for _ in 0..count {
            let id = new_id("ins");
            // As on the real cloud there always is one: a guest that keeps its own must insist.
            let hostname = match text(call, "HostName") {
                "" => format!("VM-{}", world.instances.len()),
                given => given.to_owned(),
            };
            let kind = match text(call, "InstanceType") {
                "" => "S5.SMALL1",
                given => given,
            };
            let instance = Instance {
                name: if name.is_empty() { "unnamed".to_owned() } else { name.to_owned() },
                image_id: image_id.to_owned(),
                zone: zone.to_owned(),
                kind: kind.to_owned(),
                hostname,
                user_data: user_data.clone(),
                state: InstanceState::Pending,
                console: lab.folder(&id).join("console.log"),
                stop: Arc::new(AtomicBool::new(false)),
                created: lab.config.clock.unix(),
            };
            world.instances.insert(id.clone(), instance);
            ids.push(id);
        }
        if uses_token {
            world.client_tokens.insert(token.to_owned(), ids.clone());
        }
    }
    ids.iter().for_each(|id| power_on(lab, id));
    Ok(json!({"InstanceIdSet": ids}))
}

/// Gives an instance power, on a thread of its own that lives as long as the machine does.
fn power_on(lab: &Arc<Lab>, id: &str) {
    let (lab, id) = (lab.clone(), id.to_owned());
    let spawned = std::thread::Builder::new().name(id.clone()).spawn({
        let (lab, id) = (lab.clone(), id.clone());
        move || keep_running(&lab, &id)
    });
    if spawned.is_err() {
        lab.set_instance(&id, InstanceState::LaunchFailed);
    }
}

fn keep_running(lab: &Lab, id: &str) {
    let Some((instance, disk, uefi)) = ({
        let world = lab.world();
        world.instances.get(id).and_then(|instance| {
            let image = world.images.get(&instance.image_id)?;
            Some((instance.clone(), image.disk.clone(), image.uefi))
        })
    }) else {
        return lab.set_instance(id, InstanceState::LaunchFailed);
    };
    let Some(hypervisor) = &lab.config.hypervisor else {
        tracing::warn!(instance = id, "no hypervisor is configured");
        return lab.set_instance(id, InstanceState::LaunchFailed);
    };
    let machine = Machine {
        id: id.to_owned(),
        disk,
        uefi,
        config_drive: ConfigDrive {
            instance_id: id.to_owned(),
            hostname: Some(instance.hostname),
            user_data: instance.user_data,
            ..ConfigDrive::default()
        },
        console: instance.console,
    };
    let has_run = AtomicBool::new(false);
    let started = || {
        has_run.store(true, Ordering::SeqCst);
        lab.set_instance(id, InstanceState::Running);
    };
    let ended = std::fs::create_dir_all(lab.folder(id)).map_err(|error| error.to_string()).and_then(|()| {
        hypervisor.run(&machine, &started, &instance.stop).map_err(|error| format!("{error:?}"))
    });
    if let Err(why) = ended {
        tracing::warn!(instance = id, why, "the machine ended");
    }
    let has_run = has_run.load(Ordering::SeqCst);
    lab.set_instance(id, if has_run { InstanceState::Stopped } else { InstanceState::LaunchFailed });
}

pub(super) fn describe_instances(lab: &Lab, call: &Call, status_only: bool) -> Result<Value, Fault> {
    let known = ["zone", "instance-id", "instance-name", "instance-state"];
    let filters = super::filters(call, &known)?;
    let world = lab.world();
    let ids = ids(&world.instances, call)?;
    let chosen: Vec<Value> = world
        .instances
        .iter()
        .filter(|(id, instance)| {
            (ids.is_empty() || ids.contains(&id.as_str()))
                && filters.iter().all(|(name, values)| {
                    let is = |value: &str| values.iter().any(|wanted| wanted == value);
                    match name.as_str() {
                        "zone" => is(&instance.zone),
                        "instance-id" => is(id),
                        "instance-name" => is(&instance.name),
                        _ => is(instance.state.name()),
                    }
                })
        })
        .map(|(id, instance)| match status_only {
            true => json!({"InstanceId": id, "InstanceState": instance.state.name()}),
            false => instance.shown(id),
        })
        .collect();
    page(call, chosen, if status_only { "InstanceStatusSet" } else { "InstanceSet" })
}

pub(super) fn start_instances(lab: &Arc<Lab>, call: &Call) -> Result<Value, Fault> {
    let started: Vec<String> = {
        let mut world = lab.world();
        let ids = ids(&world.instances, call)?;
        in_state(&world.instances, &ids, InstanceState::Stopped)?;
        for (_, instance) in world.instances.iter_mut().filter(|(id, _)| ids.contains(&id.as_str())) {
            instance.state = InstanceState::Starting;
            instance.stop = Arc::new(AtomicBool::new(false));
        }
        ids.into_iter().map(str::to_owned).collect()
    };
    started.iter().for_each(|id| power_on(lab, id));
    Ok(json!({}))
}

pub(super) fn stop_instances(lab: &Lab, call: &Call) -> Result<Value, Fault> {
    let mut world = lab.world();
    let ids = ids(&world.instances, call)?;
    in_state(&world.instances, &ids, InstanceState::Running)?;
    for (_, instance) in world.instances.iter_mut().filter(|(id, _)| ids.contains(&id.as_str())) {
        instance.state = InstanceState::Stopping;
        instance.stop.store(true, Ordering::SeqCst);
    }
    Ok(json!({}))
}

pub(super) fn terminate_instances(lab: &Lab, call: &Call) -> Result<Value, Fault> {
    let mut world = lab.world();
    for id in ids(&world.instances, call)? {
        if let Some(instance) = world.instances.remove(id) {
            instance.stop.store(true, Ordering::SeqCst);
        }
    }
    Ok(json!({}))
}

fn in_state(instances: &BTreeMap<String, Instance>, ids: &[&str], state: InstanceState) -> Result<(), Fault> {
    match ids.iter().find(|id| instances.get(**id).is_some_and(|instance| instance.state != state)) {
        Some(id) => {
            Err(Fault::new("InvalidInstance.NotSupported", format!("`{id}` is not {}.", state.name())))
        }
        None => Ok(()),
    }
}

/// The instances named in a request, all of which must exist.
fn ids<'a>(instances: &BTreeMap<String, Instance>, call: &'a Call) -> Result<Vec<&'a str>, Fault> {
    let ids = texts(call, "InstanceIds");
    if ids.len() > 100 {
        return Err(Fault::new("InvalidParameterValue.LimitExceeded", "InstanceIds takes 100 ids."));
    }
    for id in &ids {
        if !id.starts_with("ins-") {
            return Err(Fault::new("InvalidInstanceId.Malformed", format!("`{id}` is no instance id.")));
        }
        if !instances.contains_key(*id) {
            let why = format!("The instance `{id}` does not exist.");
            return Err(Fault::new("InvalidInstanceId.NotFound", why));
        }
    }
    Ok(ids)
}
