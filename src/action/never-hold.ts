import type { LiveJob } from '../snapshot/jobs.js';

/** What others wait for: frozen, it would hold up those that are to make room, or whoever wants to look. */
const NEVER_HELD = [
  /^(init|systemd)(\.scope)?$/,
  /^systemd-[^/]*$/,
  /^(dbus|dbus-daemon|dbus-broker)(\.service)?$/,
  /^(dockerd|docker|containerd|containerd-shim.*|podman|crio|cri-o|kubelet|runc)(\.service)?$/,
  /^sshd?(\.service)?$/,
];

/** Whether a job may be frozen while an answer is awaited. */
export function mayBeHeld({ name, settings }: LiveJob): boolean {
  const last = name.slice(name.lastIndexOf('/') + 1);
  return !settings.protected && !NEVER_HELD.some((pattern) => pattern.test(last));
}
