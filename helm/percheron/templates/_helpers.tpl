{{- define "percheron.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "percheron.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "percheron.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "percheron.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
percheron.dev/run: {{ .Values.run.name }}
{{- end }}

{{- define "percheron.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "percheron.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "percheron.image" -}}
{{- $image := index .root.Values.images .which -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end }}

{{- /* All coordinators, leader or not: a worker tries one after another. */ -}}
{{- define "percheron.coordinators" -}}
{{- $name := include "percheron.fullname" . -}}
{{- $port := int .Values.coordinator.port -}}
{{- $namespace := .Release.Namespace -}}
{{- $all := list -}}
{{- range $i := until (int .Values.coordinator.replicas) -}}
{{- $all = append $all (printf "http://%s-coordinator-%d.%s-coordinator.%s.svc:%d" $name $i $name $namespace $port) -}}
{{- end -}}
{{- join "," $all -}}
{{- end }}

{{- /* The recipe's elastic.max_recovery in whole seconds, rounded up; 10 if it does not say. */ -}}
{{- define "percheron.maxRecovery" -}}
{{- $line := regexFind "(?m)^\\s*max_recovery\\s*=\\s*\"[0-9]+(ms|s|m)\"" .Values.run.recipe -}}
{{- $number := regexFind "[0-9]+" $line -}}
{{- if not $line -}}10
{{- else if hasSuffix "ms\"" $line -}}{{- div (add (int $number) 999) 1000 -}}
{{- else if hasSuffix "m\"" $line -}}{{- mul (int $number) 60 -}}
{{- else -}}{{- $number -}}
{{- end -}}
{{- end }}

{{- define "percheron.grace" -}}
{{- if kindIs "invalid" .Values.workers.terminationGracePeriodSeconds -}}
{{- add (int (include "percheron.maxRecovery" .)) 20 -}}
{{- else -}}
{{- .Values.workers.terminationGracePeriodSeconds -}}
{{- end -}}
{{- end }}

{{- define "percheron.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroup: {{ .Values.podSecurity.runAsGroup }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "percheron.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "percheron.storeEnv" -}}
{{- range $name, $value := .Values.store.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "percheron.storeEnvFrom" -}}
{{- with .Values.store.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "percheron.tokenVolume" -}}
- name: token
  secret:
    secretName: {{ .Values.auth.existingSecret }}
    defaultMode: 0440
    items:
      - key: {{ .Values.auth.key }}
        path: token
{{- end }}

{{- define "percheron.check" -}}
{{- if gt (int .Values.workers.min) (int .Values.workers.max) -}}
{{- fail (printf "workers.min is %d and workers.max is %d: min may not be above max" (int .Values.workers.min) (int .Values.workers.max)) -}}
{{- end -}}
{{- if and (eq .Values.workers.kind "JobSet") (ne .Values.workers.completionMode "Indexed") -}}
{{- fail "workers.kind JobSet needs workers.completionMode Indexed" -}}
{{- end -}}
{{- if and (hasPrefix "cuda" .Values.workers.device) (not .Values.workers.gpu.resource) -}}
{{- fail "workers.device is cuda and workers.gpu.resource is empty: name the resource, such as nvidia.com/gpu" -}}
{{- end -}}
{{- end }}

{{- define "percheron.egress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- to:
    {{- range .Values.networkPolicy.storeCIDRs }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.storePorts }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
