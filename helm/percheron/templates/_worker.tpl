{{- /* The pod of a worker, for a Job and for a JobSet. */ -}}
{{- define "percheron.workerPod" -}}
metadata:
  # Without the chart's version: a Job's pods cannot be changed, and an upgrade may only resize it.
  labels:
    {{- include "percheron.selector" . | nindent 4 }}
    app.kubernetes.io/component: worker
    percheron.dev/run: {{ .Values.run.name }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "percheron.serviceAccount" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  # SIGTERM has a worker leave after the step in flight. The recipe's max_recovery is {{ include "percheron.maxRecovery" . }} s.
  terminationGracePeriodSeconds: {{ include "percheron.grace" . }}
  {{- with .Values.images.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.workers.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.workers.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- include "percheron.podSecurity" . | nindent 4 }}
  {{- $selector := merge (dict) .Values.workers.nodeSelector }}
  {{- if .Values.workers.spot.enabled }}
  {{- $selector = merge $selector .Values.workers.spot.nodeSelector }}
  {{- end }}
  {{- with $selector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  tolerations:
    {{- range list "not-ready" "unreachable" }}
    - key: node.kubernetes.io/{{ . }}
      operator: Exists
      effect: NoExecute
      tolerationSeconds: {{ $.Values.workers.nodeLostSeconds }}
    {{- end }}
    {{- with .Values.workers.gpu.resource }}
    - key: {{ . }}
      operator: Exists
      effect: NoSchedule
    {{- end }}
    {{- if .Values.workers.spot.enabled }}
    {{- with .Values.workers.spot.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- with .Values.workers.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if .Values.workers.topologySpread.enabled }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ .Values.workers.topologySpread.topologyKey }}
      whenUnsatisfiable: {{ .Values.workers.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "percheron.selector" . | nindent 10 }}
          app.kubernetes.io/component: worker
  {{- end }}
  containers:
    - name: worker
      image: {{ include "percheron.image" (dict "root" . "which" "worker") }}
      imagePullPolicy: {{ .Values.images.worker.pullPolicy }}
      command: [percheron, guard]
      args:
        - --log={{ .Values.run.log }}
        {{- with .Values.workers.notice }}
        - --notice={{ . }}
        {{- end }}
        - --
        - --coordinator={{ include "percheron.coordinators" . }}
        - --run={{ .Values.run.name }}
        - --token-file=/etc/percheron/token/token
        - --name=$(POD_NAME)
        - --listen=$(POD_IP):{{ .Values.workers.port }}
        - --threads={{ .Values.workers.threads }}
        - --device={{ .Values.workers.device }}
        - --transport={{ .Values.workers.transport }}
        {{- with .Values.workers.extraArgs }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        - name: POD_IP
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        # A machine that turns out to be broken is known by this name.
        - name: PERCHERON_NODE
          valueFrom:
            fieldRef:
              fieldPath: spec.nodeName
        - name: PERCHERON_DATA_CACHE
          value: /var/cache/percheron
        {{- with include "percheron.storeEnv" . | trim }}{{ . | nindent 8 }}{{ end }}
      {{- with include "percheron.storeEnvFrom" . | trim }}{{ . | nindent 6 }}{{ end }}
      ports:
        - name: peers
          containerPort: {{ .Values.workers.port }}
      securityContext:
        {{- include "percheron.containerSecurity" . | nindent 8 }}
      resources:
        {{- $resources := deepCopy .Values.workers.resources }}
        {{- with .Values.workers.gpu.resource }}
        {{- $_ := set $resources "limits" (merge (dict . 1) (default (dict) $resources.limits)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - name: token
          mountPath: /etc/percheron/token
          readOnly: true
        - name: shard-cache
          mountPath: /var/cache/percheron
        - name: scratch
          mountPath: /tmp
        {{- if .Values.workers.gpu.resource }}
        - name: shared-memory
          mountPath: /dev/shm
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "percheron.tokenVolume" . | nindent 4 }}
    - name: shard-cache
      {{- if .Values.shardCache.hostPath }}
      hostPath:
        path: {{ .Values.shardCache.hostPath }}
        type: DirectoryOrCreate
      {{- else }}
      emptyDir:
        sizeLimit: {{ .Values.shardCache.sizeLimit }}
        {{- with .Values.shardCache.medium }}
        medium: {{ . }}
        {{- end }}
      {{- end }}
    - name: scratch
      emptyDir:
        sizeLimit: 1Gi
    {{- if .Values.workers.gpu.resource }}
    # NCCL speaks between processes of one node by way of it.
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: 1Gi
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* The spec of the workers' Job. What a worker ends with: 0 the run is finished or an operator let it go,
       2 it was refused, 75 it was asked to stop or no coordinator answered: start it again; else it failed. */ -}}
{{- define "percheron.workerJob" -}}
parallelism: {{ .Values.workers.max }}
{{- if eq .Values.workers.completionMode "Indexed" }}
completions: {{ .Values.workers.max }}
completionMode: Indexed
backoffLimitPerIndex: {{ .Values.workers.failuresPerWorker }}
{{- end }}
backoffLimit: {{ .Values.workers.failuresMax }}
podReplacementPolicy: Failed
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        containerName: worker
        operator: In
        values: [2]
    - action: Ignore
      onExitCodes:
        containerName: worker
        operator: In
        values: [75]
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
template:
  {{- include "percheron.workerPod" . | nindent 2 }}
{{- end }}
